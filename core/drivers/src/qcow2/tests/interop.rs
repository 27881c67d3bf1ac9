//! Images that QEMU made, and images that QEMU must understand.

use super::harness::*;
use driveline_op::status;
use std::fs;

/// Reads an image of QEMU's and compares with what `qemu-img convert` finds in it.
fn reads_like_qemu(path: &std::path::Path, backing: Option<&World>) {
    let image = World::open(fs::read(path).unwrap(), backing, true).unwrap();
    let raw = path.with_extension("raw");
    run("qemu-img", &["convert", "-O", "raw", path.to_str().unwrap(), raw.to_str().unwrap()]);
    assert!(image.contents() == fs::read(&raw).unwrap(), "{}", path.display());
}

#[test]
fn images_of_every_shape_read_as_qemu_reads_them() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (i, options) in [
        "compat=0.10,cluster_size=512",
        "compat=0.10,cluster_size=65536",
        "compat=1.1,cluster_size=512,refcount_bits=1",
        "compat=1.1,cluster_size=4096,refcount_bits=64",
        "compat=1.1,cluster_size=65536",
        "compat=1.1,cluster_size=2097152",
    ]
    .into_iter()
    .enumerate()
    {
        let path = dir.path().join(format!("{i}.qcow2"));
        run("qemu-img", &["create", "-f", "qcow2", "-o", options, path.to_str().unwrap(), "5000k"]);
        let commands =
            ["write -P 7 0 3k", "write -P 9 100k 300k", "write -z 150k 70k", "write -P 3 4999k 1k"];
        qemu_io(&path, &commands.map(String::from));
        reads_like_qemu(&path, None);
    }
}

#[test]
fn compressed_clusters_and_chains_read_as_qemu_reads_them() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("source");
    let mut data = pattern(1, 1 << 20);
    data[100_000..700_000].fill(5);
    fs::write(&raw, &data).unwrap();
    for options in ["compression_type=zlib", "compression_type=zstd,cluster_size=4096"] {
        let base = dir.path().join("base.qcow2");
        let top = dir.path().join("top.qcow2");
        let names = [raw.to_str().unwrap(), base.to_str().unwrap(), top.to_str().unwrap()];
        run("qemu-img", &["convert", "-c", "-O", "qcow2", "-o", options, names[0], names[1]]);
        run("qemu-img", &["create", "-f", "qcow2", "-b", names[1], "-F", "qcow2", names[2], "1500k"]);
        qemu_io(&top, &["write -P 1 64k 10k".into(), "write -P 2 1200k 8k".into()]);
        reads_like_qemu(&base, None);
        let base_world = World::open(fs::read(&base).unwrap(), None, true).unwrap();
        reads_like_qemu(&top, Some(&base_world));
        let top = World::open(fs::read(&top).unwrap(), Some(&base_world), true).unwrap();
        let own = top.status(64 << 10, 64 << 10).unwrap();
        assert_eq!((own.flags & status::DATA, own.depth), (status::DATA, 1));
        assert_eq!(top.status(0, 64 << 10).unwrap().depth, 2);
        let past = top.status(1100 << 10, 64 << 10).unwrap();
        assert_eq!((past.flags, past.depth), (status::ZERO, 2), "the end of the backing decides it");
    }
}
