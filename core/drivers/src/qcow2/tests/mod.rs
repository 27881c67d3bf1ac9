//! Whole images: against QEMU, against crashes, against damage.

mod bitmaps;
mod changes;
mod check;
mod compressing;
mod crash;
mod damage;
mod data_file;
mod harness;
mod interop;
mod marks;
mod packing;
mod races;
mod random;
mod refuse;
mod snapshots;
mod subclusters;
