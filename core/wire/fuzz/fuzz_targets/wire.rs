//! `cargo +nightly fuzz run wire` in `core/wire`: any bytes through every decoder.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| driveline_wire::fuzz::decode_everything(bytes));
