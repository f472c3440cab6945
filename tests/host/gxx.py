"""Compile a .cu file of common/kernels with g++ and run its kernels on the host, under the sanitizers."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from common.kernels import launch

HERE = Path(__file__).parent
FLAGS = "-std=c++20 -O1 -g -Wall -Wextra -Werror -Wno-unknown-pragmas -ffp-contract=off".split()
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer".split()


def kernel_names(stem):
    """Names of the kernels in common/kernels/<stem>.cu, macros expanded."""
    text = re.sub(r"^#(?!define|undef|pragma|if|el|endif).*$", "", launch.source(stem), flags=re.M)
    command = ["g++", "-E", "-P", "-x", "c++", "-"]
    expanded = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(", expanded.stdout)


class HostKernels:
    """The kernels of common/kernels/<stem>.cu as a host program in `folder`. Skips, loudly, where g++ is missing.

    flags: further options of g++.
    """

    def __init__(self, stem, folder, flags=()):
        if not shutil.which("g++"):
            pytest.skip("g++ not found: the CUDA sources are not run on the host")
        self.names = kernel_names(stem)
        self.program = Path(folder) / f"host_{stem}"
        source = Path(launch.__file__).with_name(f"{stem}.cu")
        kernels = " ".join(f"KERNEL({name})" for name in self.names)
        defines = [f'-DKERNEL_SOURCE="{source}"', f"-DKERNELS={kernels}"]
        if "__syncthreads" in launch.source(stem):
            defines += ["-DBARRIERS", "-pthread"]
        files = [f"-I{HERE}", str(HERE / "host_main.cpp"), "-o", str(self.program)]
        built = subprocess.run(["g++", *FLAGS, *flags, *SANITIZERS, *defines, *files], capture_output=True, text=True)
        assert built.returncode == 0, built.stderr

    def run(self, launches):
        """Run [(name, grid, block, arguments)]; returns, per launch, its arrays afterwards.

        An argument is an array (or (array, offset), placed `offset` bytes behind a 16-byte boundary) or a NumPy scalar.
        """
        stream = bytearray()
        for name, grid, block, arguments in launches:
            stream += f"{name} {' '.join(map(str, (*grid, *block)))} {len(arguments)}\n".encode()
            for argument in arguments:
                if isinstance(argument, np.generic):
                    stream += f"s {argument.nbytes}\n".encode() + argument.tobytes()
                else:
                    array, offset = argument if isinstance(argument, tuple) else (argument, 0)
                    stream += f"b {array.nbytes} {offset}\n".encode() + array.tobytes()
            stream += b"\n"
        done = subprocess.run([str(self.program)], input=bytes(stream), capture_output=True)
        assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr.decode()}"
        return self._results(launches, memoryview(done.stdout))

    def launch(self, stem, name, grid, block, *arguments):
        """launch.launch with tensors of the CPU, on boundaries of 16 bytes: what the kernel changes is written back."""
        given = [each.view(torch.uint8).numpy() if isinstance(each, torch.Tensor) else each for each in arguments]
        placed = [(each.copy(), 0) if isinstance(each, np.ndarray) else each for each in given]
        (results,) = self.run([(name, grid, block, placed)])
        before = [each[0] for each in placed if isinstance(each, tuple)]
        arrays = [each for each in given if isinstance(each, np.ndarray)]
        for array, old, new in zip(arrays, before, results, strict=True):
            if not np.array_equal(old, new):  # one tensor may be several arguments, of which a kernel writes one
                array[...] = new

    @staticmethod
    def _results(launches, output):
        results = []
        for *_, arguments in launches:
            arrays = []
            for argument in arguments:
                if not isinstance(argument, np.generic):
                    array = argument[0] if isinstance(argument, tuple) else argument
                    arrays.append(np.frombuffer(output[: array.nbytes], array.dtype).reshape(array.shape))
                    output = output[array.nbytes :]
            results.append(arrays)
        assert not output, f"{len(output)} bytes too many"
        return results
