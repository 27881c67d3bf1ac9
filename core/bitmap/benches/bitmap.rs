//! What marks, merges and walks cost.
fn main() {}
