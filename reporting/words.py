"""The page's paragraphs."""

METHODS = """Every network at the same place on each axis: its accuracy after the last epoch on the test set. Points
of one data set share figures, those of different ones never do: the digits are scikit-learn's 1,797 images of 8x8
pixels, which any network learns within minutes, and say nothing about the papers' claims. Grey points are networks
without the paper's method, which it compares itself with."""

ON_DIGITS = """Hollow, as all runs on digits are: no reproduction of a paper's number. The same images are drawn as
28x28 grey ones for DeepShift's MNIST networks and as 32x32 colour ones for the others."""

ON_REAL_DATA = """Hollow: fewer epochs or fewer training images than the paper's. Such runs differ in both, and in
schedules, so that across papers they compare costs, not methods. Epochs are those of the run alone: one that began
with the weights of another has had the other's too."""

LOAD = """Load while latency was measured, this report's own work included: {load}. Times taken beside other work are
too long."""

AS_PUBLISHED = """Accuracies as the papers and their READMEs print them, not run here; costs are counted here, of the
same networks, by the same rules. epsilon-ResNets have the costs of all their blocks: which ones compression removes
is not published."""

COUNTED = """Counted for one image: convolutions and linear layers. Batch norm, activations, pooling, the additions of
shortcuts, biases and the moves of a zero-FLOP shift are free, as in the papers.
Parameters: numbers that inference needs, one for each weight. DeepShift-PS trains two for each and S3 four. The side
branch of an epsilon-ResNet is for training only and left out; a block is counted until compression removes it.
Bits: 32 for each number and for batch norm's statistics; weights of shift layers take those they are trained for.
Multiplications: multiply-adds of layers with float weights. A shift weight costs a shift in place of the product; its
sign makes the sum a difference, which is free. Weights that are 0 are counted like others.
Energy: {float_mac:g} pJ for a float multiply-add and {shift_add:g} pJ for a shift with an integer addition, from the
table below. Shift layers are taken to run on 32-bit fixed point, which DeepShift trains with, and S3 allows but does
not train with. Only arithmetic is in it: no memory traffic, which often costs more, no control and no leakage. It
compares methods and does not predict what a device draws.
Latency: this machine ({machine}), batch 1, float32, eager, the median of {repeats} after {warm_up} to warm up, of
networks with random weights, as their evaluation scripts run them. DeepShift and S3 compute their weights anew for
each image and multiply with them: this is the time of the form that is trained, not of packed weights and shift
kernels, which benchmarks/bench_bitshift.py measures."""

SOURCES = """Float and integer operations: M. Horowitz, Computing's energy problem (and what we can do about it),
ISSCC 2014 (45 nm, 0.9 V). Shift: H. You et al., ShiftAddNet: a hardware-inspired deep network, NeurIPS 2020 (45 nm,
fixed point)."""

PUBLISHED = """As the papers and their READMEs print them. “Here” is the last epoch of the runs found or recorded that
repeat a row's command; a short run, with fewer epochs or images, is no reproduction of the number beside it. Parameters
“here” are those of the same network, counted."""
