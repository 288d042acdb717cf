"""The steps of benchmarks/gpu_proof.py: each runs in a process of its own, and writes what it finds line by line.

records.py    the file of results, and the items of a step
runner.py     starts the steps' processes, watches them and ends them
backends.py   arrays, calls and clocks: of PyTorch's CUDA, of the simulated GPU, and of the driver alone
cells.py      which problems are timed, and in which order
clocks.py     what nvidia-smi says of the GPU, and the rate of its copies meanwhile
calls.py      calls of the kernels for them, and the check against float64
steps.py      what each step does; tests.py, sanitizers.py and peers.py have some of it
peers.py      the same work by PyTorch, cuDNN and torch.compile
calibrate.py  fits the policy's constants to measured times
sanitized.py  the small program that runs below NVIDIA's compute-sanitizer
summary.py    Markdown from the results, whole or in part
predict.py    what counted bytes say, without a GPU
"""
