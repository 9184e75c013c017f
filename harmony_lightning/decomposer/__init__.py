"""The decomposer room: from any `nn.Module` tree to layers, by name and size."""
