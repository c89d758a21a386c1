"""The differences between the JAX releases that jaxlm runs on, in one place.

Two sets are tested: the newest that Python 3.11 can have, and the one that Colab preinstalls
(colab/constraints.txt). Nothing here knows about jaxlm.
"""
