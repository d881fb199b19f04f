"""What a model directory is, before anything of it runs: the verbs check and inspect."""
