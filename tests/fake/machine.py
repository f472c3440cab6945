"""What `torch.cuda` says and does on a machine with fake GPUs: queries, the current device, streams, graphs, jiterator.

`install` patches the process for good, so only for a process that ends with its test. torch.cuda.set_device stays as it
is: it refuses a device without a number.
"""

import contextlib
import os
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

NAME = "fake GPU"
PROPERTIES = {"name": NAME, "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 80 * 2**30}


class Machine:
    """Its GPUs and what is current. As in CUDA, the first question decides what CUDA_VISIBLE_DEVICES leaves of them."""

    def __init__(self, mode, gpus: int):
        self.mode, self.gpus, self.visible, self.device, self.stream = mode, gpus, None, 0, None

    def count(self) -> int:
        now = os.environ.get("CUDA_VISIBLE_DEVICES")
        if self.visible is None:
            self.visible = (now, self.gpus if now is None else min(self.gpus, len([n for n in now.split(",") if n])))
        if self.visible[0] != now:
            raise RuntimeError(f"CUDA was asked for its devices before CUDA_VISIBLE_DEVICES became {now}: too late")
        return self.visible[1]

    def set_device(self, index: int):
        if not 0 <= index < self.count():
            raise RuntimeError(f"CUDA error: invalid device ordinal ({index} of {self.count()})")
        self.device = index

    def exchange_device(self, index: int) -> int:
        before = self.device
        if index >= 0:
            self.set_device(index)
        return before

    def get_device(self) -> int:
        return self.device

    def properties(self, device=None):
        return SimpleNamespace(**PROPERTIES)

    def current_stream(self, device=None):
        return self.stream or DEFAULT_STREAM

    def raw_stream(self, device) -> int:
        return self.current_stream().cuda_stream

    @contextlib.contextmanager
    def use_stream(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def synchronize(self, device=None):
        self.mode.wait("wait", "torch.cuda.synchronize")

    def compile_and_launch(self, code, name, by_reference, count, tensors, numbers):
        """jiterator's entry: refuses what it would refuse."""
        parameters = code[code.index("(") + 1 : code.index(")")].split(",")
        given = len(tensors) + len(numbers) + (count if by_reference else 0)
        if len(parameters) != given or len(tensors) > 8 or count > 8:
            raise RuntimeError(f"jiterator: {name} takes {len(parameters)} arguments, not {given}")
        if len({(tensor.device, tensor.dtype) for tensor in tensors}) > 1 or not tensors[0].is_cuda:
            raise RuntimeError(f"jiterator: {name} wants tensors of one type on one CUDA device")
        self.mode.log.launch(stem="jiterator", name=name)
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
        results = tuple(torch.empty_like(tensors[0].expand(shape)) for _ in range(count))
        return results if count > 1 else results[0]


class Stream:
    """A stream in name: nothing here runs later than it is asked to."""

    number = 0

    def __init__(self, device=None, priority=0):
        Stream.number += 1
        self.cuda_stream, self.device = Stream.number - 1, device

    def wait_stream(self, stream): ...

    def wait_event(self, event): ...

    def record_event(self, event=None):
        return event or Event()

    def synchronize(self):
        torch.cuda.synchronize()


class Event:
    def __init__(self, *args, **kwargs): ...

    def record(self, stream=None): ...

    def wait(self, stream=None): ...

    def query(self):
        return True

    def elapsed_time(self, other):
        return 1.0

    def synchronize(self):
        torch.cuda.synchronize()


DEFAULT_STREAM = Stream()


class Graph:
    """Records no kernels, but which memory they read: a replay raises where some of it was freed in between.

    Between capture_begin and capture_end whatever waits for the device raises, as in CUDA.
    """

    machine = None  # set by install

    def __init__(self, keep_graph=False):
        self.memory = None

    def capture_begin(self, pool=None, capture_error_mode="global"):
        if self.machine.current_stream() is DEFAULT_STREAM:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self.machine.mode.recording = self.memory = Memory()

    def capture_end(self):
        self.machine.mode.recording = None
        self.memory.made.clear()

    def replay(self):
        if self.memory is None or self.machine.mode.recording is not None:
            raise RuntimeError("a CUDA graph is replayed before it is recorded")
        self.memory.check()
        self.machine.mode.log.replays += 1
        self.machine.mode.log.step(training=True)

    def pool(self):
        return (0, 1)

    def reset(self):
        self.memory = None


class Memory:
    """Storages that recorded operations read and that were there before."""

    def __init__(self):
        self.read, self.made = {}, {}

    def note(self, inputs: list[Tensor], outputs: list[Tensor], where: str):
        """An operation of a recording."""
        for tensor in inputs:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.made and storage._cdata not in self.read:
                self.read[storage._cdata] = StorageWeakRef(storage), tuple(tensor.shape), where
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.read:
                self.made[storage._cdata] = storage

    def check(self):
        for storage, shape, where in self.read.values():
            if storage.expired():
                raise RuntimeError(f"a CUDA graph is replayed whose input of shape {shape} was freed (read at {where})")


@contextlib.contextmanager
def record(graph, pool=None, stream=None, capture_error_mode="global"):
    """torch.cuda.graph"""
    with torch.cuda.stream(stream or Stream()):
        graph.capture_begin(pool, capture_error_mode)
        try:
            yield
        finally:
            graph.capture_end()


def install(machine: Machine):
    """Make this process believe that it is on `machine`."""
    cuda, Graph.machine = torch.cuda, machine
    nothing = lambda *args, **kwargs: None  # noqa: E731
    here = {
        "is_available": lambda: machine.count() > 0, "device_count": machine.count, "is_initialized": lambda: True,
        "init": nothing, "_lazy_init": nothing, "current_device": machine.get_device,
        "_exchange_device": machine.exchange_device, "_maybe_exchange_device": machine.exchange_device,
        "get_device_name": lambda device=None: NAME, "get_device_properties": machine.properties,
        "get_device_capability": lambda device=None: (PROPERTIES["major"], PROPERTIES["minor"]),
        "is_bf16_supported": lambda *args, **kwargs: True, "synchronize": machine.synchronize,
        "current_stream": machine.current_stream, "default_stream": lambda device=None: DEFAULT_STREAM,
        "stream": machine.use_stream, "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": record,
        "graph_pool_handle": lambda: (0, 1), "is_current_stream_capturing": lambda: machine.mode.recording is not None,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8), "set_rng_state": nothing,
        "manual_seed": nothing, "manual_seed_all": nothing, "empty_cache": nothing,
        "memory_allocated": lambda device=None: 0, "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": nothing, "mem_get_info": lambda device=None: (70 * 2**30, 80 * 2**30),
    }  # fmt: skip
    for name, stand_in in here.items():
        setattr(cuda, name, stand_in)
    below = {
        "_cuda_setDevice": machine.set_device, "_cuda_getDevice": machine.get_device, "_cuda_init": nothing,
        "_cuda_getDeviceCount": machine.count, "_cuda_getCurrentRawStream": machine.raw_stream,
        "_cuda_jiterator_compile_and_launch_kernel": machine.compile_and_launch,
    }  # fmt: skip
    for name, stand_in in below.items():
        setattr(torch._C, name, stand_in)
    torch.accelerator.is_available = cuda.is_available
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")
