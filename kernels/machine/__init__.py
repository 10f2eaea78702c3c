"""What knows of LLVM, the CPU, the cache of compiled code and threads. Files above this folder never say `llvm`."""
