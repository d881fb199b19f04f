"""The fuzzer: damaged files and senseless arguments for every verb, and what each run may do about them."""
