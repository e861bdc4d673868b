//! What happens for each VMCS allocates nothing: translation, and the way between a region and its values.

mod counting;

use counting::allocations;
use hypernest_vmcs::{Field, FieldSet, Layout, Losses, RegionMap, Translation, Vmcs};

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
