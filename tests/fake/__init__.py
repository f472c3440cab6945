"""Parts of tests/fake_cuda.py: a machine with GPUs that is not there."""
