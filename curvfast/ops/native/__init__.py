"""The C++ and CUDA cores: the only modules that touch their extensions."""
