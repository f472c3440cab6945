"""effnets::shift2d as a torch operator: gradients, opcheck, torch.compile, torch.export, autocast, vmap, torch.func."""

import io

import pytest
import torch

from common.kernels import shift2d, shift2d_reference

OPERATOR = torch.ops.effnets.shift2d.default


@pytest.mark.parametrize("kernel_size, dilation", [(2, 1), (3, 1), (3, 2), (4, 1)])
def test_gradcheck(kernel_size, dilation):
    """First and second derivatives, reverse and forward mode; even kernels are not symmetric."""
    x = torch.randn(1, kernel_size**2 + 1, 3, 4, dtype=torch.float64, requires_grad=True)

    def operation(x):
        return shift2d(x, kernel_size, dilation)

    assert torch.autograd.gradcheck(operation, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(operation, x)
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(operation, x)


@pytest.mark.parametrize("kernel_size, dilation", [(2, 3), (3, 1), (5, 2)])
def test_backward_is_the_adjoint(kernel_size, dilation):
    """<u, Kx> = <K'u, x>, exactly, on integers."""
    x, u = torch.randint(-9, 9, (2, 3, 60, 8, 9)).float()
    adjoint = OPERATOR(u, kernel_size, dilation, -1)
    assert (u * shift2d(x, kernel_size, dilation)).sum() == (adjoint * x).sum()


def test_gradient_of_a_broadcast_gradient():
    """sum() sends back a gradient without strides of its own."""
    x = torch.randn(2, 9, 3, 3, requires_grad=True)
    shift2d(x).sum().backward()
    assert torch.equal(x.grad, shift2d_reference(torch.ones(2, 9, 3, 3), direction=-1))


def opcheck_inputs():
    x = torch.randn(2, 19, 5, 6)
    yield x.clone().requires_grad_(), 3, 1, 1
    yield x.contiguous(memory_format=torch.channels_last).requires_grad_(), 3, 2, -1
    yield x.mT, 2, 1, 1
    yield x[:, :3], 3, 1, 1
    yield x[:0], 3, 1, 1
    yield x.bfloat16(), 1, 1, 1


@pytest.mark.parametrize("arguments", list(opcheck_inputs()), ids=lambda a: f"{tuple(a[0].shape)}-{a[0].dtype}-{a[1:]}")
def test_opcheck(arguments):
    torch.library.opcheck(OPERATOR, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend):
    """One opaque operator in a full graph; values and gradients of eager mode, for changing shapes and layouts."""

    def operation(x):
        return (shift2d(x * 2, 3, 1) + 1).relu()

    torch._dynamo.reset()
    compiled = torch.compile(operation, fullgraph=True, backend=backend)
    x = torch.randn(2, 19, 5, 6)
    for example in (x, x.contiguous(memory_format=torch.channels_last), x[:1], torch.randn(3, 19, 7, 4)):
        example = example.detach().requires_grad_()
        y, expected = compiled(example), operation(example)
        assert torch.equal(y, expected)
        assert torch.equal(*(torch.autograd.grad(out.sum(), example)[0] for out in (y, expected)))


def test_compiled_graph_holds_one_operator():
    graphs = []

    def collect(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    torch._dynamo.reset()
    torch.compile(shift2d, fullgraph=True, backend=collect)(torch.randn(1, 9, 3, 3))
    assert graphs == [[OPERATOR]]


class Shift(torch.nn.Module):
    def forward(self, x):
        return shift2d(x, 3, 2)


def test_export():
    """Exported with a free batch size, saved, loaded and run."""
    x = torch.randn(2, 19, 5, 6)
    program = torch.export.export(Shift(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}})
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [OPERATOR]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (1, 2, 5):
        x = torch.randn(batch, 19, 5, 6)
        assert torch.equal(loaded(x), shift2d_reference(x, 3, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_autocast_keeps_the_dtype(dtype):
    x = torch.randn(1, 9, 3, 3, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = shift2d(x)
    assert torch.equal(y, shift2d_reference(x)) and y.dtype == dtype


@pytest.mark.parametrize("in_dim", [0, 2, -1])
def test_vmap(in_dim):
    x = torch.randn(4, 2, 19, 5, 6)
    mapped = torch.vmap(lambda x: shift2d(x, 3, 2), in_dims=in_dim)(x.movedim(0, in_dim))
    assert torch.equal(mapped, torch.stack([shift2d_reference(sample, 3, 2) for sample in x]))


@pytest.mark.parametrize("transform", ["grad", "per-sample grad", "jacrev", "jacfwd", "jvp", "hessian"])
def test_torch_func(transform):
    x, v = torch.randn(2, 3, 1, 10, 3, 2, dtype=torch.float64)

    def derivative(operation):
        def loss(x):
            return (operation(x) ** 3).sum()

        return {
            "grad": lambda: torch.func.grad(loss)(x[0]),
            "per-sample grad": lambda: torch.vmap(torch.func.grad(loss))(x),
            "jacrev": lambda: torch.func.jacrev(operation)(x[0]),
            "jacfwd": lambda: torch.func.jacfwd(operation)(x[0]),
            "jvp": lambda: torch.func.jvp(operation, (x[0],), (v[0],))[1],
            "hessian": lambda: torch.func.hessian(loss)(x[0]),
        }[transform]()

    assert torch.equal(derivative(shift2d), derivative(shift2d_reference))


def test_inference_mode_and_no_grad():
    x = torch.randn(1, 9, 3, 3, requires_grad=True)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = shift2d(x)
            assert torch.equal(y, shift2d_reference(x)) and not y.requires_grad


def test_default_device_does_not_matter():
    """The kernel's work space is on the CPU whatever the default device is."""
    x = torch.randn(1, 9, 3, 3)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        with torch.device("meta"):
            y = shift2d(x)
        assert torch.equal(y, shift2d_reference(x))
