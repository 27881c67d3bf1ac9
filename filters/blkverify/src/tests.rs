use super::Blkverify;
use driveline_sdk::testing::{self, Leaf, Node, json};

const SIZE: u64 = 1 << 20;

fn world() -> (Leaf, Leaf, Node) {
    let (raw, test) = (testing::memory(SIZE), testing::memory(SIZE));
    let node = testing::open_with::<Blkverify>(json!({}), &raw, &[("test", &test)]).unwrap();
    (raw, test, node)
}

#[test]
fn the_readme_is_true() {
    testing::check_readme::<Blkverify>(include_str!("../README.md"), |text| toml::from_str(text).unwrap());
}

#[test]
fn both_children_get_what_is_written_and_one_gets_flushes() {
    let (raw, test, node) = world();
    testing::block_on(async {
        node.write(512, &[7; 512]).await.unwrap();
        assert_eq!(node.read(0..2048).await.unwrap()[512..1024], [7; 512]);
        node.flush().await.unwrap();
    });
    assert_eq!(raw.seen(), ["write 512+512", "read 0+2048"]);
    assert_eq!(test.seen(), ["write 512+512", "read 0+2048", "flush"]);
    assert!(node.failures().is_empty());
}

#[test]
fn a_difference_is_an_error_that_says_where_and_marks_the_node() {
    let (_, test, node) = world();
    test.set_data(70_000, &[1]);
    testing::block_on(async {
        node.read(0..65536).await.unwrap();
        assert_eq!(node.read(65536..131_072).await.unwrap_err().code(), 5);
    });
    assert_eq!(
        node.failures(),
        ["blkverify: read sector_num=128 nb_sectors=128 contents mismatch at offset 70000"]
    );
}

#[test]
fn an_error_of_one_child_alone_is_a_difference() {
    let (raw, test, node) = world();
    test.fail("write", 0..512, 28, 1);
    assert_eq!(testing::block_on(node.write(0, &[1; 512])).unwrap_err().code(), 5);
    assert_eq!(
        node.failures(),
        ["blkverify: write sector_num=0 nb_sectors=1 return value mismatch 0 != -28"]
    );
    // The same error in both is one that the guest gets.
    for child in [&raw, &test] {
        child.fail("read", 0..512, 5, 1);
    }
    assert_eq!(testing::block_on(node.read(0..512)).unwrap_err().code(), 5);
    assert_eq!(node.failures().len(), 1);
}

#[test]
fn a_read_during_a_write_is_no_difference() {
    let (raw, test, node) = world();
    raw.set_latency(std::time::Duration::from_millis(3));
    test.set_latency(std::time::Duration::from_millis(1));
    let node = &node;
    testing::block_on(testing::join((0..20).map(|i| async move {
        if i % 2 == 0 {
            node.write(0, &[i as u8; 4096]).await.unwrap();
        } else {
            node.read(0..8192).await.unwrap();
        }
    })));
    assert!(node.failures().is_empty(), "{:?}", node.failures());
}
