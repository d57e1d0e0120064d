"""What rooms of two floors and more use, without importing ours: files, budget, hub, devices, identity, ranks, tables."""
