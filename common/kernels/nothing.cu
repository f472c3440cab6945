// Does nothing. launch.py runs it first on each device, to learn whether CuPy can launch at all beside this PyTorch.
extern "C" __global__ void nothing() {}
