//! What happens for each VMCS allocates nothing: translation, and the way between a region and its values.

#![expect(unsafe_code, reason = "an allocator that counts has to be one")]

use std::alloc::{GlobalAlloc, Layout as Memory, System};
use std::cell::Cell;

use hypernest_vmcs::{Field, FieldSet, Layout, Losses, RegionMap, Translation, Vmcs};

struct Counting;

thread_local! {
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Memory) -> *mut u8 {
        // A thread that ends has no count any more.
        let _ = COUNT.try_with(|count| count.set(count.get() + 1));
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Memory) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations(run: impl FnOnce()) -> usize {
    let before = COUNT.get();
    run();
    COUNT.get() - before
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(1)))), 1);
}

#[test]
fn translations_and_maps_allocate_nothing() {
    let (mut from, mut to) = ([0; 4096], [0; 4096]);
    for one in Layout::built_in() {
        for other in Layout::built_in() {
            let mut vmcs = Vmcs::new();
            vmcs.set(Field::GUEST_RIP, 0x1000);
            one.write(&vmcs, &mut from).unwrap();
            let map = Translation::new(one, other);
            let count = allocations(|| map.run(&from, &mut to, Losses::Allowed).unwrap());
            assert_eq!(count, 0, "{} to {}", one.name(), other.name());
        }
        let map = RegionMap::new(one, &FieldSet::ALL);
        let mut vmcs = Vmcs::new();
        let count = allocations(|| {
            map.read(&from, &mut vmcs);
            map.write(&vmcs, &mut to);
        });
        assert_eq!(count, 0, "{}", one.name());
    }
}
