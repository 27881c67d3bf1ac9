use super::*;
use crate::{config::Address, exports::NewExport};
use driveline_bitmap::{Durability, View};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

fn pick<T: Clone>(random: &mut StdRng, from: &[T]) -> T {
    from[random.random_range(0..from.len())].clone()
}

fn shape(random: &mut StdRng, depth: u32) -> Shape {
    let options = json!({ "size": random.random_range(1..3), "path": pick(random, &["a", "b"]) });
    let Value::Object(mut options) = options else { unreachable!() };
    if random.random_bool(0.5) {
        options.shift_remove("path");
    }
    let mut children = BTreeMap::new();
    for child in ["file", "backing"] {
        let of = match random.random_range(0..4) {
            0 => continue,
            1 => Child::Named(pick(random, &["n0", "n1", "n2"]).to_owned()),
            2 if depth > 0 => Child::Inside(Box::new(shape(random, depth - 1))),
            _ => Child::None,
        };
        children.insert(child.to_owned(), of);
    }
    let read_only = pick(random, &[None, Some(false), Some(true)]);
    let driver = pick(random, &["qcow2", "raw"]).to_owned();
    Shape { name: None, driver, read_only, options, children }
}

fn drive(random: &mut StdRng) -> DriveShape {
    let mut bitmaps = BTreeMap::new();
    for name in ["b0", "b1"] {
        if random.random_bool(0.5) {
            let (granularity, view) = (Some(65536), View::Drive);
            let bitmap =
                BitmapShape { granularity, view, recording: random.random_bool(0.5), durability: None };
            bitmaps.insert(name.to_owned(), bitmap);
        }
    }
    let root = pick(random, &["n0", "n1"]).to_owned();
    DriveShape {
        root,
        bitmaps,
        checkpoints: Vec::new(),
        permanent_holder: random.random_bool(0.3),
        store: None,
    }
}

fn export(random: &mut StdRng, id: &str) -> ExportShape {
    let export = NewExport {
        id: id.to_owned(),
        target: pick(random, &["d0", "n1"]).to_owned(),
        name: id.to_owned(),
        description: String::new(),
        writable: random.random_bool(0.5),
        writethrough: false,
        bitmaps: Vec::new(),
        live_bitmaps: true,
        allocation_depth: false,
        allow_inactive: false,
        thread: None,
        tls: None,
    };
    ExportShape { at: Address::Unix(pick(random, &["/a.sock", "/b.sock"]).into()), export }
}

fn state(random: &mut StdRng) -> State {
    let mut state = State::default();
    for name in ["n0", "n1", "n2", "d0", "d1", "e0", "e1"] {
        match name.as_bytes()[0] {
            _ if random.random_bool(0.3) => {}
            b'n' => drop(state.nodes.insert(name.to_owned(), shape(random, 2))),
            b'd' => drop(state.drives.insert(name.to_owned(), drive(random))),
            _ => drop(state.exports.insert(name.to_owned(), export(random, name))),
        }
    }
    state
}

/// Does the steps on a state.
fn make(state: &mut State, plan: &Plan) {
    for step in plan.steps.clone() {
        match step {
            Step::Open(name, shape) | Step::Reopen(name, shape, _) => drop(state.nodes.insert(name, shape)),
            Step::Repoint { node, child, after, .. } => {
                let of = after.map_or(Child::None, Child::Named);
                state.nodes.get_mut(&node).unwrap().children.insert(child, of);
            }
            Step::Close(name, _) => drop(state.nodes.remove(&name).unwrap()),
            Step::TakeOut(name, _) => drop(state.inserted.remove(&name).unwrap()),
            Step::PutBack(name, inserted) => drop(state.inserted.insert(name, inserted)),
            Step::NewDrive(name, shape) => drop(state.drives.insert(name, shape)),
            Step::EndDrive(name) => drop(state.drives.remove(&name).unwrap()),
            Step::NewExport(id, shape) | Step::ChangeExport(id, shape, _) => {
                drop(state.exports.insert(id, shape))
            }
            Step::EndExport(id) => drop(state.exports.remove(&id).unwrap()),
            Step::Lead { drive, after, .. } => state.drives.get_mut(&drive).unwrap().root = after,
            Step::Holder { drive, permanent } => {
                state.drives.get_mut(&drive).unwrap().permanent_holder = permanent;
            }
            Step::Store { drive, place } => state.drives.get_mut(&drive).unwrap().store = Some(place),
            Step::NewBitmap { drive, name, shape } => {
                state.drives.get_mut(&drive).unwrap().bitmaps.insert(name, shape);
            }
            Step::Record { drive, name, recording } => {
                state.drives.get_mut(&drive).unwrap().bitmaps.get_mut(&name).unwrap().recording = recording;
            }
            Step::EndBitmap { drive, name } => {
                state.drives.get_mut(&drive).unwrap().bitmaps.remove(&name).unwrap();
            }
        }
    }
}

#[test]
fn a_plan_leads_from_any_state_to_any_other_and_from_none_to_itself() {
    for seed in 0..2000 {
        println!("seed {seed}");
        let mut random = StdRng::seed_from_u64(seed);
        let (running, wanted) = (state(&mut random), state(&mut random));
        assert_eq!(plan(&running, &running, true), Plan::default());
        let planned = plan(&running, &wanted, true);
        assert_eq!(planned.refused, []);
        let mut made = running.clone();
        make(&mut made, &planned);
        let left = plan(&made, &wanted, true);
        assert_eq!(left, Plan::default(), "from {running:#?} to {wanted:#?} by {planned:#?}");
    }
}

fn one(options: Value, children: &[(&str, Child)]) -> Shape {
    let Value::Object(options) = options else { unreachable!() };
    let children = children.iter().map(|(name, child)| ((*name).to_owned(), child.clone())).collect();
    Shape { name: None, driver: "qcow2".to_owned(), read_only: None, options, children }
}

#[test]
fn a_child_by_name_is_exchanged_and_anything_else_is_opened_anew() {
    let named = |name: &str| Child::Named(name.to_owned());
    let file = |cache: &str| Child::Inside(Box::new(one(json!({ "cache": cache }), &[])));
    let state = |shape: Shape| State { nodes: [("active".to_owned(), shape)].into(), ..State::default() };
    let before = state(one(json!({}), &[("file", file("none")), ("backing", named("base"))]));
    let lines = |after: Shape| {
        plan(&before, &state(after), false).steps.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let other_base = one(json!({}), &[("file", file("none")), ("backing", named("other"))]);
    assert_eq!(lines(other_base), ["~ node active  backing: base -> other"]);
    let other_cache = one(json!({}), &[("file", file("writeback")), ("backing", Child::None)]);
    let expected = "~ node active, opened anew  backing: base -> none; file.cache: \"none\" -> \"writeback\"";
    assert_eq!(lines(other_cache), [expected]);
    // What a file does not say is the image's own business.
    assert_eq!(lines(one(json!({}), &[("file", file("none"))])), [""; 0]);
}

#[test]
fn bitmaps_are_never_lost_by_the_way() {
    let bitmap = |granularity| BitmapShape {
        granularity: Some(granularity),
        view: View::Drive,
        recording: true,
        durability: Some(Durability::Process),
    };
    let state = |bitmaps: &[(&str, BitmapShape)]| {
        let bitmaps = bitmaps.iter().map(|(name, shape)| ((*name).to_owned(), *shape)).collect();
        let (root, checkpoints) = ("n".to_owned(), Vec::new());
        let drive = DriveShape { root, bitmaps, checkpoints, permanent_holder: false, store: None };
        State { drives: [("vda".to_owned(), drive)].into(), ..State::default() }
    };
    let running = state(&[("daily", bitmap(65536)), ("weekly", bitmap(65536))]);
    assert_eq!(plan(&running, &state(&[("daily", bitmap(65536))]), false), Plan::default());
    let pruned = plan(&running, &state(&[("daily", bitmap(65536))]), true);
    assert_eq!(pruned.steps[0].to_string(), "- bitmap vda/weekly  for good");
    let other = plan(&running, &state(&[("daily", bitmap(4096))]), false);
    assert!(other.steps.is_empty());
    assert!(other.refused[0].why.starts_with("bitmap 'daily' is there with another granularity"));
    // Who says none takes what there is.
    let unsaid = BitmapShape { granularity: None, ..bitmap(65536) };
    assert_eq!(plan(&running, &state(&[("daily", unsaid)]), false), Plan::default());
}
