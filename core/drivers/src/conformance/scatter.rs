//! A filter that passes the memory of reads and writes on in small pieces.

use driveline_op::{
    Body, Edge, Instance, Memory, Next, OpTable, ReadRequest, Result, Route, Target, WriteRequest,
};
use std::sync::Arc;

/// The lengths of the pieces, in turn; not multiples of anything.
const PIECES: [u64; 6] = [1, 511, 4096, 513, 3, 70_001];

struct Scatter {
    /// Pieces are multiples of this.
    alignment: u64,
}

static OPERATIONS: OpTable<Scatter> = OpTable::new().read(Scatter::read).write(Scatter::write);

/// The same node, with every read and write arriving in several pieces of memory.
pub fn scattered(edge: &Edge) -> Edge {
    let scatter = Scatter { alignment: u64::from(edge.info().memory_alignment) };
    let body = Arc::new(Body { cookie: 0, driver: scatter });
    let target = Target::new(Instance::new(body, &OPERATIONS), vec![edge.clone()]);
    Edge::new(*edge.info(), |op| if target.instance().has(op) { Route::To(&target) } else { Route::As(edge) })
}

impl Scatter {
    fn pieces(&self, length: u64) -> Vec<std::ops::Range<u64>> {
        let (mut at, mut out) = (0, Vec::new());
        for piece in PIECES.iter().cycle() {
            if at == length {
                break;
            }
            let end = (at + piece.next_multiple_of(self.alignment)).min(length);
            out.push(at..end);
            at = end;
        }
        out
    }

    async fn read(&self, next: &mut Next<'_>, request: &ReadRequest<'_>) -> Result<()> {
        let mut memory = Memory::empty();
        for piece in self.pieces(request.length()) {
            memory.push(request.part(piece));
        }
        next.read(&memory.read_request(request.offset())).await
    }

    async fn write(&self, next: &mut Next<'_>, request: &WriteRequest<'_>) -> Result<()> {
        let mut memory = Memory::empty();
        for piece in self.pieces(request.length()) {
            memory.push(request.part(piece));
        }
        next.write(&memory.write_request(request.offset(), request.flags())).await
    }
}
