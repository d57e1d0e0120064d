"""Tools for any `nn.Module`: attributes, wrappers, replaced methods, watched forwards. This package knows no router."""
