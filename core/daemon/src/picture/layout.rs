//! Where the boxes of a picture go: in layers from the top down, each as near as can be to what leads to it.

use super::Picture;

/// Pixels.
pub(crate) const GAP_X: f64 = 28.0;
pub(crate) const GAP_Y: f64 = 46.0;
pub(crate) const MARGIN: f64 = 16.0;
pub(crate) const LINE: f64 = 16.0;
const PADDING: f64 = 12.0;
/// How wide a letter is drawn, about.
const LETTER: f64 = 7.0;

/// A box with its place.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Place {
    pub(crate) x: f64,
    pub(crate) y: f64,
    pub(crate) width: f64,
    pub(crate) height: f64,
}

impl Place {
    pub(crate) fn middle(&self) -> f64 {
        self.x + self.width / 2.0
    }
}

/// The lines that a box shows.
pub(crate) fn lines(picture: &Picture, at: usize) -> Vec<String> {
    let item = &picture.items[at];
    let mut lines = Vec::new();
    if item.name.is_empty() {
        lines.push(item.kind.clone());
    } else {
        lines.push(item.name.clone());
        lines.push(item.kind.clone());
    }
    lines.extend(item.details.iter().cloned());
    lines
}

/// Places for all boxes, and the size of the picture.
pub(crate) fn layout(picture: &Picture) -> (Vec<Place>, f64, f64) {
    let count = picture.items.len();
    let layers = layers(picture);
    let mut places: Vec<Place> = (0..count)
        .map(|at| {
            let lines = lines(picture, at);
            let letters = lines.iter().map(|line| line.chars().count()).max().unwrap_or(1);
            let width = (letters as f64 * LETTER + 2.0 * PADDING).max(80.0);
            Place { width, height: lines.len() as f64 * LINE + PADDING, ..Place::default() }
        })
        .collect();
    let mut y = MARGIN;
    let mut right = 0.0_f64;
    for layer in rows(picture, &layers) {
        let height = layer.iter().map(|at| places[*at].height).fold(0.0, f64::max);
        let mut x = MARGIN;
        for at in layer {
            // Below what leads to it, unless a neighbour is there already.
            let above: Vec<f64> = parents(picture, at).map(|parent| places[parent].middle()).collect();
            let wanted = match above.len() {
                0 => x,
                n => above.iter().sum::<f64>() / n as f64 - places[at].width / 2.0,
            };
            let place = &mut places[at];
            place.x = wanted.max(x);
            place.y = y;
            x = place.x + place.width + GAP_X;
            right = right.max(place.x + place.width);
        }
        y += height + GAP_Y;
    }
    (places, right + MARGIN, (y - GAP_Y + MARGIN).max(2.0 * MARGIN))
}

fn parents(picture: &Picture, at: usize) -> impl Iterator<Item = usize> + '_ {
    let leads = move |(_, item): &(usize, &super::Item)| item.below.iter().any(|(_, below)| *below == at);
    picture.items.iter().enumerate().filter(leads).map(|(parent, _)| parent)
}

/// The layer of each box: one more than the deepest of those that lead to it.
fn layers(picture: &Picture) -> Vec<usize> {
    let mut layers = vec![0; picture.items.len()];
    // A graph without cycles settles after as many rounds as it has layers.
    for _ in 0..picture.items.len() {
        for (at, item) in picture.items.iter().enumerate() {
            for (_, below) in &item.below {
                layers[*below] = layers[*below].max(layers[at] + 1);
            }
        }
    }
    layers
}

/// The boxes of each layer, in the order in which they are met from above.
fn rows(picture: &Picture, layers: &[usize]) -> Vec<Vec<usize>> {
    let mut rows: Vec<Vec<usize>> = vec![Vec::new(); layers.iter().max().map_or(0, |deepest| deepest + 1)];
    let mut order = picture.tops();
    let mut next = 0;
    while next < order.len() {
        for (_, below) in &picture.items[order[next]].below {
            if !order.contains(below) {
                order.push(*below);
            }
        }
        next += 1;
    }
    for at in order {
        rows[layers[at]].push(at);
    }
    rows
}
