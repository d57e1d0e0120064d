"""What rooms of two floors and more use, without importing ours: files, hub, devices, identity, ranks, tables."""
