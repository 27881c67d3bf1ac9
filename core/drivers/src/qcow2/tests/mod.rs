//! Whole images: against QEMU, against crashes, against damage.

mod harness;
mod interop;
