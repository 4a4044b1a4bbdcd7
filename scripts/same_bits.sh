# Sourced by scripts that train what is shipped: the order of additions, so each bit, is the same on
# any number of cores, and on CPUs with and without AVX-512.
export OPENBLAS_NUM_THREADS=1 OPENBLAS_CORETYPE=Haswell
export NPY_DISABLE_CPU_FEATURES="AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR"
