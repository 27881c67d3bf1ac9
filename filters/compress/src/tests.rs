use super::Compress;
use driveline_drivers::conformance::{Check, check};
use driveline_sdk::{
    info,
    testing::{self, Below, Leaf, Node, json},
};

const CLUSTER: u64 = 64 << 10;
/// The last cluster is shorter.
const SIZE: u64 = 3 * CLUSTER + 512;

fn world() -> (Leaf, Node) {
    let below = testing::memory(SIZE).with_info(|it| {
        it.flags |= info::COMPRESSES;
        it.cluster_bytes = CLUSTER as u32;
    });
    let node = testing::open::<Compress>(json!({}), &below).unwrap();
    (below, node)
}

#[test]
fn the_readme_is_true() {
    testing::check_readme::<Compress>(include_str!("../README.md"), |text| toml::from_str(text).unwrap());
}

#[test]
fn it_conforms() {
    testing::block_on(check(&world().1.edge(), Check { steps: 40, ..Check::default() }));
}

#[test]
fn whole_clusters_are_written_compressed_at_once() {
    let (below, node) = world();
    testing::block_on(node.write(CLUSTER, &vec![7; 2 * CLUSTER as usize])).unwrap();
    assert_eq!(below.seen(), ["write 65536+131072 compressed"]);
    testing::block_on(node.write(3 * CLUSTER, &[8; 512])).unwrap();
    assert_eq!(below.seen(), ["write 196608+512 compressed"], "the disk ends with it");
}

#[test]
fn a_part_of_a_cluster_is_written_with_the_rest_of_it() {
    let (below, node) = world();
    below.set_data(0, &[1; 3 * CLUSTER as usize]);
    testing::block_on(node.write(100, &vec![2; CLUSTER as usize])).unwrap();
    let seen =
        ["read 0+65536", "write 0+65536 compressed", "read 65536+65536", "write 65536+65536 compressed"];
    assert_eq!(below.seen(), seen);
    let mut expected = vec![1; 3 * CLUSTER as usize];
    expected[100..100 + CLUSTER as usize].fill(2);
    assert_eq!(below.data(0..3 * CLUSTER), expected);
}

#[test]
fn writes_to_one_cluster_lose_nothing_of_each_other() {
    let (below, node) = world();
    below.set_latency(std::time::Duration::from_millis(1));
    let node = &node;
    testing::block_on(testing::join((0..16).map(|i| async move {
        node.write(i * 700, &[i as u8 + 1; 700]).await.unwrap();
    })));
    for i in 0..16 {
        assert_eq!(below.data(i * 700..(i + 1) * 700), [i as u8 + 1; 700]);
    }
}

#[test]
fn any_write_stores_what_it_should() {
    let seed = 0x5eed_u64;
    println!("seed {seed:#x}");
    let (below, node) = world();
    let (mut model, mut random) = (vec![0; SIZE as usize], seed);
    let mut pick = |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (random >> 33) % below
    };
    for step in 0..300 {
        let offset = pick(SIZE);
        let length = 1 + pick((SIZE - offset).min(2 * CLUSTER));
        let data = vec![step as u8; length as usize];
        testing::block_on(node.write(offset, &data)).unwrap();
        model[offset as usize..][..length as usize].copy_from_slice(&data);
    }
    assert_eq!(below.data(0..SIZE), model);
    let seen = below.seen();
    let writes: Vec<_> = seen.iter().filter(|seen| seen.starts_with("write")).collect();
    assert!(writes.iter().all(|seen| seen.ends_with(" compressed")), "{writes:?}");
}

#[test]
fn a_child_that_cannot_compress_is_refused() {
    let error = testing::open::<Compress>(json!({}), &testing::memory(SIZE)).unwrap_err();
    assert!(error.to_string().starts_with("Compression is not supported for underlying format"), "{error}");
}
