// The parts of a bf16 training step that are neither large matrix products nor worth a chain of torch operators.
//
// Plain C on pointers, so that it compiles in seconds and does not depend on a torch version. Every kernel splits its
// rows or heads over threads in a fixed way and sums in a fixed order: the same input gives the same bits for any number
// of threads. All arithmetic is in fp32; bf16 is what is read and written, rounded to nearest even.
//
// Shapes: T positions, D width, H query heads, G key heads (H a multiple of G), d head size.
//
// One file to the compiler: what is small is made part of what calls it, whichever file it is in. In this order.

#include "rowwise.c"
#include "attention.c"
#include "adapters.c"
#include "linear.c"
