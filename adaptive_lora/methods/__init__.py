"""The methods: how parameters are spent. One file or package each."""
