//! One test for each kind of reason, and hostile bytes.

use hypernest_cpu::{VmxChoice, VmxLayouts};
use hypernest_machine::{DeviceInfo, Layout, Machine, MachineBuilder, Model};
use proptest::prelude::*;

use super::*;

fn builder<'a>() -> MachineBuilder<'a> {
    Machine::builder().memory(1 << 20)
}

fn offered(builder: MachineBuilder<'_>) -> Offer {
    Offer::of(&builder.build().unwrap()).unwrap()
}

fn host(choices: Choices) -> Host {
    Host::of(&choices).unwrap()
}

fn named(name: &str) -> Layout {
    Layout::named(name).unwrap().clone()
}

fn written(name: &str) -> VmxLayouts {
    VmxLayouts {
        written: Some(named(name)),
        ..VmxLayouts::default()
    }
}

/// The reasons in words. Each is one line that says what to do.
fn words(offer: &Offer, host: &Host) -> Vec<String> {
    // What comes over the wire is what was sent.
    let offer = &Offer::from_bytes(&offer.to_bytes()).unwrap();
    let host = &Host::from_bytes(&host.to_bytes()).unwrap();
    let words: Vec<String> = refusals(offer, host)
        .iter()
        .map(Reason::to_string)
        .collect();
    for line in &words {
        assert!(!line.contains('\n') && !line.contains("  "), "{line}");
        assert!(line.contains(": "), "{line}");
    }
    words
}

fn has(words: &[String], parts: &[&str]) -> bool {
    words
        .iter()
        .any(|line| parts.iter().all(|part| line.contains(part)))
}

#[test]
fn every_machine_goes_to_an_equal_place_and_is_built_there_the_same() {
    let everything = host(Choices {
        hyperv: true,
        ..Choices::default()
    });
    for model in Model::all() {
        for vmx in [VmxChoice::None, VmxChoice::Kvm, VmxChoice::Max] {
            for hyperv in [false, true] {
                let builder = builder().model(model.name).vmx(vmx.clone()).hyperv(hyperv);
                let machine = builder.cpus(2).build().unwrap();
                let offer = Offer::of(&machine).unwrap();
                assert_eq!(words(&offer, &everything), [""; 0]);
                assert_eq!(offer.differences(), []);
                let config = offer.config(&VmxLayouts::default()).unwrap();
                assert_eq!(&config, machine.config());
            }
        }
    }
}

#[test]
fn a_format_that_is_not_read_is_refused() {
    let mut offer = offered(builder());
    offer.formats[0].version += 1;
    let words = words(&offer, &host(Choices::default()));
    assert_eq!(words.len(), 1);
    assert!(has(&words, &["format: the machine state has version"]));
}

#[test]
fn more_memory_and_processors_than_are_taken_are_refused() {
    let mut offer = offered(builder());
    (offer.memory, offer.cpus) = (4 << 20, 1000);
    let small = host(Choices {
        memory: 2 << 20,
        ..Choices::default()
    });
    let words = words(&offer, &small);
    assert_eq!(words.len(), 2);
    assert!(has(&words, &["memory", "4194304", "2097152", "--memory"]));
    assert!(has(&words, &["processors", "1000", "--cpus"]));
}

#[test]
fn clocks_of_another_rate_are_refused() {
    let mut offer = offered(builder());
    offer.rates[0] += 1;
    let words = words(&offer, &host(Choices::default()));
    assert_eq!(words.len(), 1);
    assert!(has(&words, &["TSC", "3000000001 Hz", "3000000000 Hz"]));
}

#[test]
fn an_unknown_or_another_model_is_refused() {
    let mut unknown = offered(builder());
    unknown.cpu.model = "granite".into();
    let lines = words(&unknown, &host(Choices::default()));
    assert_eq!(lines.len(), 1);
    assert!(has(&lines, &["CPU model granite", "hypernest, baseline"]));
    let mut other = offered(builder());
    other.cpu.physical_bits = 46;
    let lines = words(&other, &host(Choices::default()));
    assert!(has(&lines, &["physical-address bits 46", "shows 40"]));
}

#[test]
fn each_feature_and_register_that_a_smaller_model_lacks_is_listed() {
    let offer = offered(builder());
    let baseline = host(Choices {
        model: Model::by_name("baseline"),
        ..Choices::default()
    });
    let words = words(&offer, &baseline);
    for part in [
        "CPU feature Ssse3 (CPUID.1:ECX bit 9)",
        "CPU feature Xsaves (CPUID.D.1:EAX bit 3)",
        "CPU feature GigabytePages (CPUID.80000001:EDX bit 26)",
        "MSR IA32_TSC_ADJUST (0x3b)",
        "MSR IA32_ARCH_CAPABILITIES (0x10a)",
    ] {
        assert!(has(&words, &[part, "--cpu baseline"]), "{part}");
    }
    let features = |name| Cpu::of(Model::by_name(name).unwrap(), false);
    let (all, few) = (features("hypernest"), features("baseline"));
    let missing = all.features.len() - few.features.len() + all.msrs.len() - few.msrs.len();
    assert_eq!(words.len(), missing);
    let small = offered(builder().model("baseline"));
    assert_eq!(self::words(&small, &baseline), [""; 0]);
}

#[test]
fn a_register_that_reads_otherwise_is_refused() {
    let mut offer = offered(builder());
    let msrs = offer.cpu.msrs.iter_mut();
    let mut capabilities = msrs.filter(|msr| msr.number == 0x10a);
    capabilities.next().unwrap().constant = Some(1);
    let words = words(&offer, &host(Choices::default()));
    assert_eq!(words.len(), 1);
    assert!(has(&words, &["IA32_ARCH_CAPABILITIES", "read 0x1 "]));
}

#[test]
fn vmx_is_refused_where_there_is_none() {
    let offer = offered(builder().vmx(VmxChoice::Max));
    let none = host(Choices {
        vmx: Some(VmxChoice::None),
        ..Choices::default()
    });
    let words = words(&offer, &none);
    assert_eq!(words.len(), 1);
    assert!(has(
        &words,
        &[
            "VMX (CPUID.1:ECX bit 5",
            "IA32_VMX_PROCBASED_CTLS3",
            "--vmx none"
        ]
    ));
}

#[test]
fn each_control_that_a_smaller_profile_lacks_is_listed() {
    let offer = offered(builder().vmx(VmxChoice::Max));
    let kvm = host(Choices {
        vmx: Some(VmxChoice::Kvm),
        ..Choices::default()
    });
    let lines = words(&offer, &kvm);
    for part in [
        "VMX proc2.18 EPT-violation #VE",
        "VMX proc1.17 Activate tertiary controls",
        "VMX proc3.4 IPI virtualization",
    ] {
        assert!(has(&lines, &[part, "--vmx"]), "{part}: {lines:#?}");
    }
    // A profile of a file, with one control less.
    let full = VmxChoice::Max.profile(&Model::all()[0]).unwrap().unwrap();
    let mut msrs: Vec<(u32, u64)> = full.caps.msrs().collect();
    let proc2 = msrs
        .iter_mut()
        .find(|(number, _)| *number == 0x48b)
        .unwrap();
    proc2.1 &= !(1 << (32 + 25));
    let poorer = host(Choices {
        vmx: Some(VmxChoice::Msrs(msrs)),
        ..Choices::default()
    });
    let lines = words(&offer, &poorer);
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert!(has(&lines, &["VMX proc2.25 Use TSC scaling"]));
    assert_eq!(words(&offered(builder()), &poorer), [""; 0]);
}

#[test]
fn a_profile_that_means_something_else_in_this_build_is_noticed() {
    let mut offer = offered(builder().vmx(VmxChoice::Kvm));
    let seen = offer.vmx_seen.as_mut().unwrap();
    seen.msrs[0].1 ^= 1 << 54;
    let differences = offer.differences();
    assert_eq!(differences.len(), 1);
    assert!(differences[0].to_string().contains("IA32_VMX_BASIC"));
}

#[test]
fn a_layout_that_is_not_known_or_differs_is_refused() {
    let layouts = VmxLayouts {
        advertised: Some(named("kvm")),
        ..written("virtualbox")
    };
    let offer = offered(builder().vmx(VmxChoice::Kvm).vmcs_layouts(layouts));
    let mut other = host(Choices::default());
    other.known.retain(|layout| layout.name != "virtualbox");
    let kvm = other.known.iter_mut().find(|layout| layout.name == "kvm");
    kvm.unwrap().digest ^= 1;
    let words = words(&offer, &other);
    assert_eq!(words.len(), 2);
    assert!(has(
        &words,
        &["layout virtualbox (revision", "0 pages", "does not know"]
    ));
    assert!(has(
        &words,
        &["layout kvm (revision 0x11e57ed0", "other slots"]
    ));
}

#[test]
fn a_layout_of_the_users_own_brings_its_table() {
    let kvm = Layout::kvm();
    let own = Layout::new("own", &[77], 4096, kvm.launch_state(), kvm.slots().to_vec()).unwrap();
    let layouts = VmxLayouts {
        written: Some(own.clone()),
        ..VmxLayouts::default()
    };
    let offer = offered(builder().vmx(VmxChoice::Kvm).vmcs_layouts(layouts));
    assert_eq!(words(&offer, &host(Choices::default())), [""; 0]);
    let config = offer.config(&written("hypernest")).unwrap();
    assert_eq!(config.layouts.accepted, [own]);
    assert_eq!(config.layouts.written, Some(named("hypernest")));
}

#[test]
fn the_advertised_layout_stays() {
    let offer = offered(builder().vmx(VmxChoice::Max));
    let layouts = VmxLayouts {
        advertised: Some(named("kvm")),
        ..VmxLayouts::default()
    };
    let words = words(
        &offer,
        &host(Choices {
            layouts,
            ..Choices::default()
        }),
    );
    assert_eq!(words.len(), 1);
    assert!(has(
        &words,
        &["layout hypernest", "advertises kvm", "--vmcs hypernest"]
    ));
}

#[test]
fn fields_that_a_layout_cannot_hold_are_named() {
    let offer = offered(builder().vmx(VmxChoice::Max));
    let narrow = Choices {
        layouts: written("kvm"),
        ..Choices::default()
    };
    let lines = words(&offer, &host(narrow));
    assert_eq!(lines.len(), 1);
    let parts = [
        "layout kvm",
        "--write-vmcs",
        "ve_information_addr",
        "--accept-vmcs kvm",
    ];
    assert!(has(&lines, &parts), "{lines:#?}");
    let lacking = offer.vmx_seen.as_ref().unwrap().fields.iter();
    let lacking = lacking.filter(|field| {
        let (field, _) = hypernest_vmcs::Field::from_encoding(**field).unwrap();
        !Layout::kvm().holds(field)
    });
    assert_eq!(
        lines[0]
            .split(" no place for ")
            .nth(1)
            .unwrap()
            .split(", which")
            .next()
            .unwrap()
            .split(", ")
            .count(),
        lacking.count()
    );
    // A machine that was offered no more than it holds goes there.
    let ready = offered(builder().vmx(VmxChoice::Max).vmcs_layouts(VmxLayouts {
        accepted: vec![named("kvm")],
        ..VmxLayouts::default()
    }));
    let layouts = written("kvm");
    let there = host(Choices {
        layouts: layouts.clone(),
        ..Choices::default()
    });
    assert_eq!(words(&ready, &there), [""; 0]);
    let config = ready.config(&layouts).unwrap();
    assert_eq!(config.layouts.written, Some(named("kvm")));
    // The same of a layout that is only accepted.
    let accepted = VmxLayouts {
        accepted: vec![named("kvm")],
        ..VmxLayouts::default()
    };
    let lines = words(
        &offer,
        &host(Choices {
            layouts: accepted,
            ..Choices::default()
        }),
    );
    assert!(has(
        &lines,
        &["layout kvm", "--accept-vmcs", "no place for"]
    ));
}

#[test]
fn a_layout_that_outgrows_the_regions_is_refused() {
    let mut offer = offered(builder().vmx(VmxChoice::Kvm));
    offer.vmx_seen.as_mut().unwrap().accepted[0].size[0] = 1024;
    let choices = Choices {
        layouts: written("hypernest"),
        ..Choices::default()
    };
    let words = words(&offer, &host(choices));
    assert!(has(
        &words,
        &["layout hypernest", "needs", "1024", "as kvm advertises"]
    ));
}

#[test]
fn a_revision_that_would_stand_for_two_layouts_is_refused() {
    let mut machine = builder()
        .vmx(VmxChoice::Kvm)
        .vmcs_layouts(VmxLayouts {
            advertised: Some(named("kvm-3.10")),
            ..VmxLayouts::default()
        })
        .build()
        .unwrap();
    let revision = Layout::kvm().revision();
    machine
        .poke_physical(0x3000, &revision.to_le_bytes())
        .unwrap();
    let offer = Offer::of(&machine).unwrap();
    let choices = Choices {
        layouts: written("kvm"),
        ..Choices::default()
    };
    let words = words(&offer, &host(choices));
    let parts = [
        "revision 0x11e57ed0",
        "kvm-3.10",
        "(1 pages",
        "of kvm, which",
        "--write-vmcs",
    ];
    assert!(has(&words, &parts), "{words:#?}");
}

#[test]
fn two_chosen_layouts_of_one_revision_are_refused() {
    let offer = offered(builder().vmx(VmxChoice::Kvm).vmcs_layouts(VmxLayouts {
        advertised: Some(named("hypernest")),
        ..VmxLayouts::default()
    }));
    let layouts = VmxLayouts {
        accepted: vec![named("kvm-3.10")],
        ..written("kvm")
    };
    let words = words(
        &offer,
        &host(Choices {
            layouts,
            ..Choices::default()
        }),
    );
    assert!(
        has(
            &words,
            &[
                "it is that of kvm in",
                "of kvm-3.10, which",
                "--accept-vmcs"
            ]
        ),
        "{words:#?}"
    );
}

#[test]
fn a_layout_for_files_is_refused() {
    let offer = offered(builder().vmx(VmxChoice::Kvm));
    let choices = Choices {
        layouts: written("xen"),
        ..Choices::default()
    };
    let words = words(&offer, &host(choices));
    assert_eq!(words.len(), 1);
    assert!(has(&words, &["layout xen", "for files"]));
}

#[test]
fn the_hyper_v_interface_is_refused_by_name_where_it_is_not_offered() {
    let offer = offered(builder().vmx(VmxChoice::Max).hyperv(true));
    let lines = words(&offer, &host(Choices::default()));
    for part in [
        "Hyper-V nested: use of the enlightened VMCS (CPUID.40000004H:EAX bit 14)",
        "Hyper-V nested: direct virtual flush",
        "Hyper-V nested: enlightened MSR bitmap (CPUID.4000000AH:EAX bit 19)",
        "Hyper-V nested: versions 1-1 of the enlightened VMCS",
        "Hyper-V synthetic interrupt controller",
    ] {
        assert!(has(&lines, &[part, "--hyperv"]), "{part}: {lines:#?}");
    }
    // Only the version is another.
    let mut newer = offer.clone();
    for (leaf, answer) in &mut newer.hyperv {
        if *leaf == hyperv::NESTED_LEAF {
            answer[0] = answer[0] & !0xffff | 0x0201;
        }
    }
    let lines = words(
        &newer,
        &host(Choices {
            hyperv: true,
            ..Choices::default()
        }),
    );
    assert_eq!(lines.len(), 1);
    assert!(has(
        &lines,
        &["versions 1-2 of the enlightened VMCS", "has 1-1"]
    ));
}

#[test]
fn devices_must_be_the_same_in_each_slot() {
    let disk = |byte| vec![byte; 4096];
    let offer = offered(builder().disk(disk(1)).console());
    let with = |devices| {
        host(Choices {
            devices,
            ..Choices::default()
        })
    };
    let (good, other) = (
        DeviceInfo::disk(&disk(1), false),
        DeviceInfo::disk(&disk(2), false),
    );
    assert_eq!(
        words(&offer, &with(vec![good.clone(), DeviceInfo::Console])),
        [""; 0]
    );
    let lines = words(&offer, &with(vec![]));
    assert_eq!(lines.len(), 2);
    assert!(has(
        &lines,
        &[
            "device 1: the machine has a disk of 4096 bytes",
            "none",
            "--disk"
        ]
    ));
    let lines = words(&offer, &with(vec![other, DeviceInfo::Console, good]));
    assert_eq!(lines.len(), 2);
    assert!(has(&lines, &["device 1", "content"]) && has(&lines, &["device 3", "no such device"]));
}

#[test]
fn all_reasons_come_together() {
    let mut offer = offered(
        builder()
            .vmx(VmxChoice::Max)
            .hyperv(true)
            .disk(vec![0; 512]),
    );
    offer.memory = 1 << 40;
    let host = host(Choices {
        model: Model::by_name("baseline"),
        vmx: Some(VmxChoice::None),
        layouts: written("xen"),
        ..Choices::default()
    });
    let words = words(&offer, &host);
    for part in [
        "memory:",
        "CPU feature",
        "MSR ",
        "VMX (",
        "layout xen",
        "Hyper-V ",
        "device 1",
    ] {
        assert!(has(&words, &[part]), "{part}");
    }
}

#[test]
fn other_versions_and_excesses_are_refused() {
    let offer = offered(builder());
    let mut bytes = offer.to_bytes();
    bytes[0] += 1;
    let version = HELLO_VERSION + 1;
    assert_eq!(Offer::from_bytes(&bytes), Err(HelloError::Version(version)));
    let long = vec![0; MAX_HELLO + 1];
    assert_eq!(Offer::from_bytes(&long), Err(HelloError::Long(long.len())));
    let mut trailing = offer.to_bytes();
    trailing.push(0);
    assert_eq!(Offer::from_bytes(&trailing), Err(HelloError::Damaged));
    let mut escape = offer.clone();
    escape.cpu.model = "\x1b[2J".into();
    assert_eq!(
        Offer::from_bytes(&escape.to_bytes()),
        Err(HelloError::Part("a name"))
    );
    let mut many = offer;
    many.hyperv = vec![(0, [0; 4]); 2000];
    assert_eq!(
        Offer::from_bytes(&many.to_bytes()),
        Err(HelloError::Part("a list"))
    );
}

proptest! {
    #[test]
    fn damaged_hellos_are_refused_or_judged(
        at in 2..2000usize,
        bit in 0..8u32,
        keep in 0..4000usize,
    ) {
        let offer = offered(builder().vmx(VmxChoice::Kvm).hyperv(true));
        let host = host(Choices::default());
        let mut bytes = offer.to_bytes();
        let len = bytes.len();
        bytes[at % len] ^= 1 << bit;
        bytes.truncate(keep.max(len / 2));
        if let Ok(offer) = Offer::from_bytes(&bytes) {
            let _ = (refusals(&offer, &host), offer.differences());
            let _ = offer.config(&VmxLayouts::default());
        }
        let mut bytes = host.to_bytes();
        bytes[at % 2000] ^= 1 << bit;
        if let Ok(host) = Host::from_bytes(&bytes) {
            let _ = refusals(&offer, &host);
        }
    }
}
