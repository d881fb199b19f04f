"""The facts of a model directory, before anything of it runs: the verbs check and inspect."""
