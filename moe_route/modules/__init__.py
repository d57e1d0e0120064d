"""Tools for other people's modules: attributes, wrappers, replaced methods, watched forwards. They know no router."""
