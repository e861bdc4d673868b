//! Which layouts a machine's VMCS regions have: the advertised one, those that are accepted, and the
//! one that is written.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use hypernest_vmcs::{FieldSet, Layout, RegionMap, TableError};
use serde::{Deserialize, Serialize};

/// The layouts that someone chose for a machine's VMCS regions; what is not said follows from the VMX
/// profile.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Names", try_from = "Names")]
pub struct VmxLayouts {
    /// The one whose revision identifier IA32_VMX_BASIC advertises, for the machine's whole life.
    pub advertised: Option<Layout>,
    /// The one that the processor writes; the advertised one where this is `None`.
    pub written: Option<Layout>,
    /// Further ones that VMPTRLD and VMXON take.
    pub accepted: Vec<Layout>,
}

/// [`VmxLayouts`] as text: names of built-in layouts, tables of others.
#[derive(Serialize, Deserialize)]
struct Names {
    advertised: Option<String>,
    written: Option<String>,
    accepted: Vec<String>,
}

impl From<VmxLayouts> for Names {
    fn from(layouts: VmxLayouts) -> Names {
        let name = |layout: &Layout| match Layout::named(layout.name()) {
            Some(built_in) if built_in == layout => layout.name().to_string(),
            _ => layout.to_table(),
        };
        Names {
            advertised: layouts.advertised.as_ref().map(name),
            written: layouts.written.as_ref().map(name),
            accepted: layouts.accepted.iter().map(name).collect(),
        }
    }
}

impl TryFrom<Names> for VmxLayouts {
    type Error = TableError;

    fn try_from(names: Names) -> Result<VmxLayouts, TableError> {
        let layout = |name: &String| match Layout::named(name) {
            Some(built_in) => Ok(built_in.clone()),
            None => Layout::from_table(name),
        };
        Ok(VmxLayouts {
            advertised: names.advertised.as_ref().map(layout).transpose()?,
            written: names.written.as_ref().map(layout).transpose()?,
            accepted: names
                .accepted
                .iter()
                .map(layout)
                .collect::<Result<_, _>>()?,
        })
    }
}

/// Layouts that a machine cannot have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutRefused {
    /// No processor can keep VMCSs in it.
    #[error(
        "layout {0} is for files: a machine's has one revision identifier of its own, a launch state, \
         and no bytes that two fields share"
    )]
    ForFiles(String),
    /// A revision identifier must say which layout a region has.
    #[error(
        "layouts {first} and {second} have the same revision {revision:#010x}; accept one of them"
    )]
    SameRevision {
        /// The one that was taken.
        first: String,
        /// The one that cannot be beside it.
        second: String,
        /// The identifier.
        revision: u32,
    },
    /// L1 makes its regions as large as IA32_VMX_BASIC says.
    #[error(
        "layout {name} needs {used} bytes, and regions have the {size} that {advertised} advertises"
    )]
    Outgrows {
        /// The layout that is too large.
        name: String,
        /// Bytes it uses.
        used: usize,
        /// The advertised layout.
        advertised: String,
        /// Bytes of its regions.
        size: usize,
    },
    /// There is no VMX for it.
    #[error("a VMCS layout is of no use without VMX; choose a VMX profile too")]
    NoVmx,
    /// What is offered to L1 cannot be kept in it.
    #[error("layout {name} has no place for {}, which the machine offers", Listed(.fields))]
    Narrows {
        /// The layout.
        name: String,
        /// Fields that exist in the machine and have no slot in it.
        fields: FieldSet,
    },
}

/// Short names of fields, with commas.
struct Listed<'a>(&'a FieldSet);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, field) in self.0.iter().enumerate() {
            let comma = if n == 0 { "" } else { ", " };
            write!(f, "{comma}{field:?}")?;
        }
        Ok(())
    }
}

/// The layouts of a machine, one for each revision identifier, ready for use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Regions {
    /// The advertised one first.
    accepted: Vec<Accepted>,
    written: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Accepted {
    layout: Layout,
    map: RegionMap,
}

impl Regions {
    /// Those of `layouts`, with `usual` as the advertised one where they name none.
    ///
    /// # Errors
    /// Where they cannot be together.
    pub fn new(usual: &Layout, layouts: &VmxLayouts) -> Result<Regions, LayoutRefused> {
        let advertised = layouts.advertised.as_ref().unwrap_or(usual);
        let mut regions = Regions {
            accepted: Vec::new(),
            written: 0,
        };
        regions.accept(advertised)?;
        for layout in &layouts.accepted {
            regions.accept(layout)?;
        }
        if let Some(written) = &layouts.written {
            regions.written = regions.accept(written)?;
        }
        Ok(regions)
    }

    /// One layout alone, whatever it is.
    pub fn only(layout: &Layout) -> Regions {
        let (layout, map) = (layout.clone(), RegionMap::new(layout, &FieldSet::ALL));
        Regions {
            accepted: Vec::from([Accepted { layout, map }]),
            written: 0,
        }
    }

    /// Takes a layout in; its place.
    fn accept(&mut self, layout: &Layout) -> Result<usize, LayoutRefused> {
        let name = layout.name().to_string();
        if !layout.is_for_machines() {
            return Err(LayoutRefused::ForFiles(name));
        }
        let revision = layout.revision();
        if let Some(place) = self.place(revision) {
            let first = &self.accepted[place].layout;
            return if first == layout {
                Ok(place)
            } else {
                Err(LayoutRefused::SameRevision {
                    first: first.name().to_string(),
                    second: name,
                    revision,
                })
            };
        }
        let advertised = self.accepted.first().map_or(layout, |first| &first.layout);
        if layout.used() > advertised.size() {
            return Err(LayoutRefused::Outgrows {
                name,
                used: layout.used(),
                advertised: advertised.name().to_string(),
                size: advertised.size(),
            });
        }
        self.accepted.push(Accepted {
            layout: layout.clone(),
            map: RegionMap::new(layout, &FieldSet::ALL),
        });
        Ok(self.accepted.len() - 1)
    }

    /// Forgets the fields that are not in `fields`.
    pub fn keep_fields(&mut self, fields: &FieldSet) {
        for one in &mut self.accepted {
            one.map = RegionMap::new(&one.layout, fields);
        }
    }

    /// The fields that all of them hold.
    pub fn held(&self) -> FieldSet {
        let masks = self.accepted.iter().map(|one| *one.layout.field_mask());
        masks.fold(FieldSet::ALL, |held, mask| held.and(&mask))
    }

    fn place(&self, revision: u32) -> Option<usize> {
        let takes = |one: &Accepted| one.map.revision() == revision;
        self.accepted.iter().position(takes)
    }

    /// The way into and out of regions with this revision identifier; `None` where it is not accepted.
    pub fn map(&self, revision: u32) -> Option<&RegionMap> {
        self.place(revision).map(|place| &self.accepted[place].map)
    }

    /// The way out of the processor.
    pub fn writer(&self) -> &RegionMap {
        &self.accepted[self.written].map
    }

    /// The layout that is advertised.
    pub fn advertised(&self) -> &Layout {
        &self.accepted[0].layout
    }

    /// The layout that is written.
    pub fn written(&self) -> &Layout {
        &self.accepted[self.written].layout
    }

    /// Every layout that is accepted, the advertised one first.
    pub fn accepted(&self) -> impl Iterator<Item = &Layout> {
        self.accepted.iter().map(|one| &one.layout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn named(name: &str) -> Layout {
        Layout::named(name).unwrap().clone()
    }

    fn regions(
        advertised: &str,
        written: &str,
        accepted: &[&str],
    ) -> Result<Regions, LayoutRefused> {
        let layouts = VmxLayouts {
            advertised: Some(named(advertised)),
            written: Some(named(written)),
            accepted: accepted.iter().map(|name| named(name)).collect(),
        };
        Regions::new(Layout::hypernest(), &layouts)
    }

    #[test]
    fn the_advertised_and_the_written_one_are_accepted_always() {
        let regions = regions("kvm-3.10", "hypernest-evmcs", &["virtualbox"]).unwrap();
        let names: Vec<&str> = regions.accepted().map(Layout::name).collect();
        assert_eq!(names, ["kvm-3.10", "virtualbox", "hypernest-evmcs"]);
        assert_eq!(regions.advertised().name(), "kvm-3.10");
        assert_eq!(regions.written().name(), "hypernest-evmcs");
        for layout in regions.accepted() {
            let map = regions.map(layout.revision()).unwrap();
            assert_eq!(map.revision(), layout.revision());
        }
        assert_eq!(regions.map(12345), None);
        let usual = Regions::new(Layout::kvm(), &VmxLayouts::default()).unwrap();
        assert_eq!(
            (usual.advertised(), usual.written()),
            (Layout::kvm(), Layout::kvm())
        );
    }

    #[test]
    fn one_revision_is_one_layout() {
        let error = regions("kvm-3.10", "kvm", &[]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "layouts kvm-3.10 and kvm have the same revision 0x11e57ed0; accept one of them"
        );
        assert!(regions("kvm", "kvm", &["kvm"]).is_ok());
    }

    #[test]
    fn layouts_for_files_are_refused() {
        for name in ["xen", "xmhf", "acrn", "evmcs-v1", "bochs"] {
            let error = regions("kvm", "kvm", &[name]).unwrap_err();
            assert_eq!(error, LayoutRefused::ForFiles(name.into()));
        }
    }

    #[test]
    fn none_outgrows_the_advertised_region() {
        let slots = Layout::hypernest().slots().to_vec();
        let launch = Layout::hypernest().launch_state();
        let used = Layout::hypernest().used();
        let tight = |size| Layout::new("tight", &[7], size, launch, slots.clone());
        let with = |advertised: Layout| {
            let layouts = VmxLayouts {
                advertised: Some(advertised),
                written: Some(named("hypernest-evmcs")),
                accepted: vec![],
            };
            Regions::new(Layout::kvm(), &layouts).map(|_| ())
        };
        assert!(with(tight(4096).unwrap()).is_ok());
        let needed = named("hypernest-evmcs").used();
        assert!(needed > used, "the test's premise");
        assert_eq!(
            with(tight(used).unwrap()),
            Err(LayoutRefused::Outgrows {
                name: "hypernest-evmcs".into(),
                used: needed,
                advertised: "tight".into(),
                size: used,
            })
        );
    }

    #[test]
    fn layouts_become_text_and_back() {
        let mine = Layout::new(
            "mine",
            &[77],
            4096,
            Layout::kvm().launch_state(),
            Layout::kvm().slots().to_vec(),
        );
        let layouts = VmxLayouts {
            advertised: Some(named("kvm")),
            written: Some(mine.unwrap()),
            accepted: vec![named("hypernest")],
        };
        let names = Names::from(layouts.clone());
        assert_eq!(names.advertised.as_deref(), Some("kvm"));
        assert!(names.written.as_ref().unwrap().starts_with("kind,"));
        assert_eq!(VmxLayouts::try_from(names).unwrap(), layouts);
    }
}
