//! Nodes: queries, adding and removing, sizes, filters.

use crate::kit::{World, has};
use serde_json::{Value, json};
use std::process::Command;

#[test]
fn nodes_are_added_as_qemus_clients_write_them_and_shown_as_they_read_them() {
    let world = World::new();
    let mut client = world.client();
    std::fs::write(world.path("disk.img"), vec![0; 1 << 20]).unwrap();
    let file = json!({ "driver": "file", "filename": world.path("disk.img"), "node-name": "libvirt-1-storage",
        "auto-read-only": true, "discard": "unmap", "cache": { "direct": false, "no-flush": false } });
    client.ok("blockdev-add", file);
    let format = json!({ "node-name": "libvirt-1-format", "read-only": false, "discard": "unmap", "driver": "raw",
        "cache": { "direct": false, "no-flush": false }, "file": "libvirt-1-storage" });
    client.ok("blockdev-add", format);
    let flat = json!({ "driver": "raw", "node-name": "flat", "file.driver": "null-co", "file.size": 65536 });
    client.ok("blockdev-add", flat);
    world.drive("vda", "libvirt-1-format");

    let nodes = client.ok("query-named-block-nodes", json!({}));
    let find = |name: &str| nodes.as_array().unwrap().iter().find(|node| node["node-name"] == name).unwrap();
    let node = find("libvirt-1-format");
    let expected = json!({
        "file": world.path("disk.img"), "node-name": "libvirt-1-format", "ro": false, "drv": "raw",
        "backing_file_depth": 0, "active": true, "encrypted": false, "detect_zeroes": "off",
        "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0,
        "image": { "filename": world.path("disk.img"), "format": "raw", "virtual-size": 1 << 20,
            "actual-size": node["image"]["actual-size"], "dirty-flag": false },
        "cache": { "writeback": true, "direct": false, "no-flush": false }, "write_threshold": 0,
    });
    assert_eq!(*node, expected);
    assert!(node["image"]["actual-size"].is_u64());
    assert_eq!(find("flat")["image"]["virtual-size"], 65536);
    assert!(find("flat")["file"].as_str().unwrap().starts_with("json:{\"driver\":\"raw\""));

    let drive = client.ok("query-block", json!({}));
    assert_eq!(drive.as_array().unwrap().len(), 1);
    assert_eq!((&drive[0]["device"], &drive[0]["type"]), (&json!("vda"), &json!("unknown")));
    assert_eq!((&drive[0]["locked"], &drive[0]["removable"]), (&json!(false), &json!(false)));
    assert_eq!(drive[0]["inserted"], expected);

    assert!(client.wrong("blockdev-del", json!({ "node-name": "libvirt-1-storage" })).contains("in use"));
    assert!(client.wrong("blockdev-del", json!({ "node-name": "libvirt-1-format" })).contains("drive 'vda'"));
    client.ok("blockdev-del", json!({ "node-name": "flat" }));
    let left = client.ok("query-named-block-nodes", json!({ "flat": true }));
    assert_eq!(left.as_array().unwrap().len(), 2);
}

#[test]
fn what_is_wrong_with_a_node_is_named_and_nothing_is_left_of_it() {
    let (_world, mut client) = World::with_disk();
    let before = client.ok("query-named-block-nodes", json!({}));
    let wrong = [
        (json!({ "node-name": "n" }), "Parameter 'driver' is missing"),
        (json!({ "driver": "null-co" }), "'node-name' must be specified for the root node"),
        (json!({ "driver": "null-co", "node-name": "disk" }), "Duplicate nodes with node-name='disk'"),
        (json!({ "driver": "null-co", "node-name": "vda" }), "Duplicate nodes with node-name='vda'"),
        (
            json!({ "driver": "null-co", "node-name": 5 }),
            "Invalid parameter type for 'node-name', expected: string",
        ),
        (json!({ "driver": "null-co", "node-name": "n", "size": "lots" }), "lots"),
        (
            json!({ "driver": "file", "node-name": "n", "filename": "/no/such/file" }),
            "No such file or directory",
        ),
        (
            json!({ "driver": "raw", "node-name": "n", "file": { "driver": "null-co", "size": 512 }, "offset": 1024 }),
            "window",
        ),
        (
            json!({ "driver": "raw", "node-name": "n", "file": "disk", "cache": { "direct": true }, "zz": 1 }),
            "Parameter 'zz' is unexpected",
        ),
    ];
    for (options, expected) in wrong {
        let text = client.wrong("blockdev-add", options.clone());
        assert!(text.contains(expected), "{options}: {text}");
    }
    assert_eq!(client.ok("query-named-block-nodes", json!({})), before);
}

#[test]
fn auto_read_only_opens_what_cannot_be_written() {
    let world = World::new();
    let mut client = world.client();
    // For the superuser only a file of the kernel's is not to be written.
    let (ours, kernels) = (world.path("ro.img"), "/sys/kernel/notes".to_owned());
    std::fs::write(&ours, [0; 512]).unwrap();
    let mut permissions = std::fs::metadata(&ours).unwrap().permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(&ours, permissions).unwrap();
    let refused = |path: &String| std::fs::OpenOptions::new().write(true).open(path).is_err();
    let Some(path) = [ours, kernels].into_iter().find(refused) else {
        return eprintln!("SKIPPED: everything here can be written");
    };
    let file = |options: Value| {
        let mut file = json!({ "driver": "file", "filename": path, "locking": "off" });
        file.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        json!({ "driver": "raw", "node-name": "n", "file": file, "auto-read-only": true })
    };
    assert!(
        client
            .wrong("blockdev-add", file(json!({ "auto-read-only": false, "read-only": false })))
            .contains(&path)
    );
    // QEMU makes no difference whether `read-only: false` is said or meant.
    for options in [json!({ "auto-read-only": true }), json!({ "auto-read-only": true, "read-only": false })]
    {
        client.ok("blockdev-add", file(options));
        let nodes = client.ok("query-named-block-nodes", json!({}));
        assert_eq!((&nodes[0]["ro"], &nodes[1]["ro"]), (&json!(true), &json!(true)));
        client.ok("blockdev-del", json!({ "node-name": "n" }));
    }
}

#[test]
fn a_drive_or_node_is_resized() {
    let (_world, mut client) = World::with_disk();
    let size = |client: &mut crate::kit::Client| {
        client.ok("query-block", json!({}))[0]["inserted"]["image"]["virtual-size"].clone()
    };
    client.ok("block_resize", json!({ "device": "vda", "size": 2 << 20 }));
    assert_eq!(size(&mut client), 2 << 20);
    client.ok("block_resize", json!({ "node-name": "disk", "size": 3 << 20 }));
    assert_eq!(size(&mut client), 3 << 20);
    let wrong = [
        (json!({ "size": 512 }), "Cannot find device='' nor node-name=''"),
        (json!({ "size": 512, "device": "zz" }), "Cannot find device='zz' nor node-name=''"),
        (json!({ "size": 512, "node-name": "zz" }), "Cannot find device='' nor node-name='zz'"),
        (json!({ "size": -1, "device": "vda" }), "Parameter 'size' expects a >0 size"),
    ];
    for (arguments, expected) in wrong {
        assert_eq!(client.wrong("block_resize", arguments), expected);
    }
    assert_eq!(size(&mut client), 3 << 20);
}

#[test]
fn a_filter_goes_in_and_out_below_a_drive() {
    let (_world, mut client) = World::with_disk();
    let root = |client: &mut crate::kit::Client| {
        client.ok("query-block", json!({}))[0]["inserted"]["node-name"].clone()
    };
    let insert = |options: Value| json!({ "options": options, "above": "vda" });
    let reply = client
        .ok("x-driveline-blockdev-insert-filter", insert(json!({ "driver": "idle", "node-name": "f" })));
    assert_eq!(reply, json!({ "node-name": "f" }));
    assert_eq!(root(&mut client), "f");
    let chain = client.ok("query-block", json!({}))[0]["inserted"].clone();
    assert_eq!(chain["backing_file_depth"], 1);
    assert_eq!(chain["image"]["backing-image"]["format"], "memory");

    let wrong = [
        (json!({ "options": { "driver": "raw" }, "above": "vda" }), "Parameter 'options.file' is missing"),
        (json!({ "options": { "driver": "null-co" }, "above": "vda" }), "'null-co' is no filter"),
        (
            json!({ "options": { "driver": "idle", "file": "disk" }, "above": "vda" }),
            "Parameter 'options.file' is unexpected",
        ),
        (
            json!({ "options": { "driver": "idle", "z": 1 }, "above": "vda" }),
            "Parameter 'options.z' is unexpected",
        ),
        (json!({ "options": {}, "above": "vda" }), "Parameter 'options.driver' is missing"),
        (
            json!({ "options": { "driver": "idle" }, "above": "zz" }),
            "Cannot find device='zz' nor node-name='zz'",
        ),
    ];
    for (arguments, expected) in wrong {
        let text = client.wrong("x-driveline-blockdev-insert-filter", arguments);
        assert!(text.contains(expected), "{text}");
    }
    assert!(
        client
            .wrong("x-driveline-blockdev-remove-filter", json!({ "node-name": "disk" }))
            .contains("no filter")
    );
    client.ok("x-driveline-blockdev-remove-filter", json!({ "node-name": "f" }));
    assert_eq!(root(&mut client), "disk");
}

#[test]
fn a_chain_of_images_reads_as_qemu_shows_it() {
    if !has("qemu-img", Command::new("qemu-img").arg("--version")) {
        return;
    }
    let world = World::new();
    let mut client = world.client();
    let create = |arguments: &[&str]| {
        let made = Command::new("qemu-img").arg("create").args(arguments).output().unwrap();
        assert!(made.status.success(), "{made:?}");
    };
    let (base, top) = (world.path("base.qcow2"), world.path("top.qcow2"));
    create(&["-f", "qcow2", &base, "1M"]);
    create(&["-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &top]);
    let open =
        json!({ "driver": "qcow2", "node-name": "top", "file": { "driver": "file", "filename": top } });
    client.ok("blockdev-add", open);
    let nodes = client.ok("query-named-block-nodes", json!({}));
    let node = &nodes[0];
    assert_eq!((&node["file"], &node["backing_file"]), (&json!(top), &json!(base)));
    assert_eq!(node["backing_file_depth"], 1);
    let image = &node["image"];
    assert_eq!(
        (&image["backing-filename"], &image["full-backing-filename"]),
        (&json!("base.qcow2"), &json!(base))
    );
    assert_eq!((&image["backing-filename-format"], &image["cluster-size"]), (&json!("qcow2"), &json!(65536)));
    assert_eq!((&image["format"], &image["backing-image"]["filename"]), (&json!("qcow2"), &json!(base)));
    assert_eq!(image["backing-image"].get("backing-image"), None);
    let specific = json!({ "compat": "1.1", "compression-type": "zlib", "lazy-refcounts": false, "refcount-bits": 16,
        "corrupt": false, "extended-l2": false });
    assert_eq!(image["format-specific"], json!({ "type": "qcow2", "data": specific }));
    assert_eq!(image["dirty-flag"], false);
    // All nodes of the chain have names, and parents come first.
    assert_eq!(nodes.as_array().unwrap().len(), 4);
}
