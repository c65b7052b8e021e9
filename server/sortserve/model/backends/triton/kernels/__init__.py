"""What runs on the device. Loading a module of this package loads Triton.

Names of tensors in capitals say their shape, as everywhere; sizes that are compiled into a kernel
are in capitals, too. No size that changes from step to step is compiled in or decides between
versions of a kernel, so nothing is compiled after the first steps, and a CUDA graph can replay a
launch.
"""
