"""The methods that allocate trainable parameters, one module or package each."""
