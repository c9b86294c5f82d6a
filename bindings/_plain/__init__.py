"""State dicts of any framework, told apart into layers and full tensors."""
