//! `cargo +nightly fuzz run store` in `core/store`: any bytes as the file of a store, opened and used. Begin with files of
//! `driveline_store::fuzz::sample` as the corpus.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| driveline_store::fuzz::run(bytes));
