//! The block cache: runs of instructions decoded once, found by RAM offset, RIP and code size.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;

use iced_x86::{Decoder, DecoderError, FlowControl, Instruction};

use crate::lower::{GONE, Op, is_hot_branch, lower};
use crate::model::Model;
use crate::ram::Ram;
use crate::vcpu::CodeSize;

#[inline(always)]
fn recent_slot(rip: u64) -> usize {
    (rip ^ rip >> 13) as usize & (RECENT - 1)
}

/// Index of a block. [`NO_BLOCK`] is none.
pub(crate) type BlockId = u32;
pub(crate) const NO_BLOCK: BlockId = u32::MAX;
/// Marks the link to a block on another page, which is right only while that block's page is where it was.
pub(crate) const FAR: u32 = 1 << 31;

/// Most instructions in a block.
pub(crate) const MAX_BLOCK: usize = 64;
/// Operations cached before all are dropped: about 40 MB with their instructions.
const MAX_OPS: usize = 512 * 1024;
const BUCKETS: usize = 1 << 16;
const RECENT: usize = 1 << 13;

/// What a block was decoded from: nothing else decides its contents.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Key {
    /// Offset of its first byte in RAM.
    pub offset: usize,
    pub rip: u64,
    pub size: CodeSize,
}

impl Key {
    fn bucket(&self) -> usize {
        let mixed =
            (self.rip ^ (self.offset as u64).rotate_left(20)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 48) as usize & (BUCKETS - 1)
    }
}

/// A decoded block: straight-line instructions within one page, with conditional branches out of it.
pub(crate) struct Block {
    pub key: Key,
    /// Its [`Code::Head`](crate::lower::Code::Head) in the cache's array.
    pub first: u32,
    /// Operations between its head and its end (fused pairs count once).
    pub ops: u16,
    /// Bytes of code.
    pub bytes: u16,
    pub valid: bool,
    next_in_bucket: BlockId,
}

/// All decoded blocks of a machine, shared by its vCPUs.
pub(crate) struct CodeCache {
    pub ops: Vec<Op>,
    /// The instructions of each block from the index after that of its head.
    pub instructions: Vec<Instruction>,
    pub blocks: Vec<Block>,
    buckets: Box<[BlockId]>,
    /// The block last found for a RIP, by a few of its bits.
    recent: Box<[BlockId]>,
    by_page: BTreeMap<u32, Vec<BlockId>>,
    /// Operations that have got a successor, each once.
    linked: Vec<u32>,
    /// Blocks end at every branch.
    pub basic: bool,
    max_block: usize,
    /// Grows when every block is dropped: numbers of blocks from before mean others now.
    pub generation: u64,
}

impl CodeCache {
    /// `max_block` limits the instructions of a block (1 to [`MAX_BLOCK`]).
    pub fn new(max_block: usize) -> CodeCache {
        CodeCache {
            ops: Vec::new(),
            instructions: Vec::new(),
            blocks: Vec::new(),
            buckets: vec![NO_BLOCK; BUCKETS].into_boxed_slice(),
            recent: vec![NO_BLOCK; RECENT].into_boxed_slice(),
            by_page: BTreeMap::new(),
            linked: Vec::new(),
            basic: false,
            max_block: max_block.clamp(1, MAX_BLOCK),
            generation: 0,
        }
    }

    /// Drops every block.
    pub fn clear(&mut self, ram: &mut Ram) {
        self.generation += 1;
        self.ops.clear();
        self.instructions.clear();
        self.blocks.clear();
        self.buckets.fill(NO_BLOCK);
        self.recent.fill(NO_BLOCK);
        self.by_page.clear();
        self.linked.clear();
        ram.forget_code();
    }

    /// Forgets which block follows which, and which were found last: every way from block to block is
    /// looked up again.
    pub fn unlink(&mut self) {
        for index in self.linked.drain(..) {
            self.ops[index as usize].link = NO_BLOCK;
        }
        self.recent.fill(NO_BLOCK);
    }

    /// The block at `key`, if it is the one last noted for such an address.
    #[inline(always)]
    pub fn recent(&self, key: &Key) -> Option<(BlockId, &Block)> {
        let id = self.recent[recent_slot(key.rip)];
        let block = self.blocks.get(id as usize)?;
        (block.key == *key && block.valid).then_some((id, block))
    }

    /// Makes `id` the block that [`CodeCache::recent`] finds for its key.
    pub fn note_recent(&mut self, id: BlockId) {
        self.recent[recent_slot(self.blocks[id as usize].key.rip)] = id;
    }

    /// Remembers that `to` follows `from` by its operation with this [`Op::at`], where that can never become
    /// wrong: within one page. To another page, in 64-bit code, with [`FAR`].
    pub fn connect(&mut self, from: BlockId, at: u16, to: BlockId) {
        let (from, to) = (&self.blocks[from as usize], &self.blocks[to as usize]);
        let (a, b) = (from.key, to.key);
        if !from.valid || a.size != b.size {
            return;
        }
        let link = if a.offset >> 12 == b.offset >> 12 && a.rip >> 12 == b.rip >> 12 {
            to.first
        } else if a.size == CodeSize::Bits64 {
            to.first | FAR
        } else {
            return;
        };
        let first = from.first as usize + 1;
        let ops = &mut self.ops[first..=first + usize::from(from.ops)];
        if let Some((n, op)) = ops.iter_mut().enumerate().find(|(_, op)| op.at == at) {
            if op.link == NO_BLOCK {
                self.linked.push((first + n) as u32);
            }
            op.link = link;
        }
    }

    pub fn find(&self, key: &Key) -> Option<BlockId> {
        let mut id = self.buckets[key.bucket()];
        while id != NO_BLOCK {
            let block = &self.blocks[id as usize];
            if block.key == *key {
                return Some(id);
            }
            id = block.next_in_bucket;
        }
        None
    }

    /// Drops the blocks of pages whose code was overwritten.
    pub fn invalidate(&mut self, pages: &[u32]) {
        for page in pages {
            for id in self.by_page.remove(page).unwrap_or_default() {
                let block = &mut self.blocks[id as usize];
                block.valid = false;
                self.ops[block.first as usize].disp = GONE;
                let (bucket, next) = (block.key.bucket(), block.next_in_bucket);
                let mut at = self.buckets[bucket];
                if at == id {
                    self.buckets[bucket] = next;
                }
                while at != NO_BLOCK && at != id {
                    let following = self.blocks[at as usize].next_in_bucket;
                    if following == id {
                        self.blocks[at as usize].next_in_bucket = next;
                    }
                    at = following;
                }
            }
        }
    }

    /// Decodes the block at `key`. `None` when not even one instruction lies wholly in the page.
    pub fn build(&mut self, key: Key, ram: &mut Ram, model: &Model) -> Option<BlockId> {
        if self.ops.len() + MAX_BLOCK + 2 > MAX_OPS {
            self.clear(ram);
        }
        let page_end = (key.offset | 0xfff) + 1;
        let head = self.instructions.len();
        debug_assert_eq!(self.ops.len(), head);
        self.instructions.push(Instruction::default());
        let first = head + 1;
        let mut bytes = 0;
        {
            let code = &ram.bytes()[key.offset..page_end];
            let mut decoder =
                Decoder::with_ip(key.size.bits(), code, key.rip, model.decoder_options());
            while self.instructions.len() - first < self.max_block {
                let instruction = decoder.decode();
                if instruction.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes {
                    break;
                }
                bytes = decoder.position();
                self.instructions.push(instruction);
                let branches = instruction.flow_control() != FlowControl::Next;
                if ends_block(&instruction) || self.basic && branches {
                    break;
                }
            }
        }
        let count = (self.instructions.len() - first) as u16;
        if count == 0 {
            self.instructions.pop();
            return None;
        }
        let id = self.blocks.len() as BlockId;
        self.ops.push(Op::head(key, count, id));
        lower(&self.instructions[first..], key, model, &mut self.ops);
        let ops = self.ops.len() - first;
        self.ops
            .push(Op::end(key.rip.wrapping_add(bytes as u64), count));
        // The two arrays stay in step although pairs may be fused.
        self.instructions.push(Instruction::default());
        self.ops.resize(self.instructions.len(), Op::default());
        ram.mark_code(key.offset, bytes);
        let bucket = key.bucket();
        self.blocks.push(Block {
            key,
            first: head as u32,
            ops: ops as u16,
            bytes: bytes as u16,
            valid: true,
            next_in_bucket: self.buckets[bucket],
        });
        self.buckets[bucket] = id;
        self.by_page
            .entry((key.offset >> 12) as u32)
            .or_default()
            .push(id);
        Some(id)
    }
}

/// Whether an instruction is the last of its block.
fn ends_block(i: &Instruction) -> bool {
    i.flow_control() != FlowControl::Next && !is_hot_branch(i)
        || i.has_rep_prefix()
        || i.has_repne_prefix()
}
