//! A drive can keep its holder for good: then its bitmaps never move.

mod common;

use driveline_daemon::{config::Config, daemon::Daemon};

#[test]
fn a_permanent_holder_has_the_bitmaps_of_its_drive() {
    common::program_with_filters();
    let text = r#"
        [node.disk]
        driver = "memory"
        size = "16MiB"

        [drive.vda]
        root = "disk"
        bitmaps = [{ name = "daily" }, { name = "off", recording = false, granularity = 4096 }]
        holder = "permanent"
    "#;
    let (config, mistakes) = Config::parse("vm.toml".as_ref(), text);
    let daemon = Daemon::start(&config, mistakes).unwrap();
    let graph = daemon.graph();
    let places = graph.bitmap_places("vda").unwrap();
    assert_eq!(places.len(), 2);
    for (node, _) in &places {
        assert_eq!(graph.node(node).unwrap().driver_name(), "bitmap-holder");
    }
    assert_eq!(&*graph.drives()[0].root, "vda-holder");
    let off = graph.bitmap("vda", "off").unwrap();
    assert!(!off.is_recording());
    assert_eq!(off.granularity().bytes(), 4096);
    daemon.stop().unwrap();
}
