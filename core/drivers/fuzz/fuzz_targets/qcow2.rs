//! `cargo +nightly fuzz run qcow2` in `core/drivers`: any bytes as an image, opened and used. Begin with images of
//! `driveline_drivers::qcow2::fuzz::sample` as the corpus.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| driveline_drivers::qcow2::fuzz::run(bytes));
