"""What several floors use, without importing ours: files, budget, hub, devices, identity, ranks, tables."""
