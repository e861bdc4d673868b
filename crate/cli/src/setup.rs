//! From the command line to a machine, as often as asked: the same run can be made again.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use hypernest_machine::boot::Symbols;
use hypernest_machine::{Config, DiskImage, Layout, Machine, Model, VmxChoice, VmxLayouts};
use hypernest_migrate::snapshot::About;

use crate::args::{ResumeArgs, RunArgs, SessionArgs, Vmx};
use crate::files;
use crate::snapshot::Origin;
use crate::trace::Names;

/// Everything a machine is made from, read and checked.
pub struct Setup {
    from: Source,
    /// What names addresses.
    pub names: Names,
}

enum Source {
    Image(Box<Booted>),
    Snapshot(Box<Origin>),
    /// A machine that came from elsewhere, and what its snapshots say of themselves.
    Elsewhere(String, About),
}

/// A machine that is booted from an image.
struct Booted {
    image: Vec<u8>,
    /// The image in messages.
    shown: String,
    name: String,
    initrd: Option<Vec<u8>>,
    modules: Vec<(String, Vec<u8>)>,
    command_line: String,
    disks: Vec<PathBuf>,
    memory: u64,
    cpus: u32,
    model: Option<String>,
    block_length: Option<u32>,
    vmx: VmxChoice,
    hyperv: bool,
    layouts: VmxLayouts,
}

impl Setup {
    /// Reads all files that `args` name.
    pub fn read(args: &RunArgs) -> Result<Setup> {
        let image = files::read("image", &args.image)?;
        let initrd = match &args.initrd {
            Some(path) => Some(files::read("initrd", path)?),
            None => None,
        };
        let modules = args.modules.iter().map(|path| {
            let bytes = files::read("module", path)?;
            Ok((files::name(path), bytes))
        });
        let modules = modules.collect::<Result<_>>()?;
        // An image may bring its own symbols.
        let names = names(&args.session, || Symbols::parse(&image).ok())?;
        let vmx = vmx(args)?;
        let layouts = layouts(args, &vmx)?;
        let booted = Booted {
            image,
            shown: args.image.display().to_string(),
            name: files::name(&args.image),
            initrd,
            modules,
            command_line: args.append.clone(),
            disks: args.disks.clone(),
            memory: args.memory,
            cpus: args.cpus,
            model: args.cpu.clone(),
            block_length: args.session.block_length,
            vmx,
            layouts,
            hyperv: args.hyperv,
        };
        Ok(Setup {
            from: Source::Image(Box::new(booted)),
            names,
        })
    }

    /// Reads the snapshot that `args` name.
    pub fn resume(args: &ResumeArgs) -> Result<Setup> {
        Ok(Setup {
            names: names(&args.session, || None)?,
            from: Source::Snapshot(Box::new(Origin::open(args)?)),
        })
    }

    /// A machine that came from elsewhere.
    pub fn received(args: &SessionArgs, from: &str, about: About) -> Result<Setup> {
        Ok(Setup {
            names: names(args, || None)?,
            from: Source::Elsewhere(from.to_owned(), about),
        })
    }

    /// Whether its machine can be made again.
    pub fn is_repeatable(&self) -> bool {
        !matches!(self.from, Source::Elsewhere(..))
    }

    /// The built-in hypervisor.
    pub fn demo() -> Setup {
        let booted = Booted {
            image: hypernest_guests::HYPERVISOR.to_vec(),
            shown: "the built-in hypervisor".into(),
            name: "built-in".into(),
            initrd: None,
            modules: Vec::new(),
            command_line: String::new(),
            disks: Vec::new(),
            memory: hypernest_guests::HYPERVISOR_MEMORY,
            cpus: 1,
            model: None,
            block_length: None,
            vmx: VmxChoice::Max,
            hyperv: false,
            layouts: VmxLayouts::default(),
        };
        Setup {
            from: Source::Image(Box::new(booted)),
            names: Names::default(),
        }
    }

    /// A machine at its first instruction, or at that of the snapshot.
    pub fn build(&self) -> Result<Machine> {
        match &self.from {
            Source::Image(booted) => booted.build().with_context(|| booted.shown.clone()),
            Source::Snapshot(origin) => origin.build(),
            Source::Elsewhere(from, _) => bail!("the machine from {from} cannot be made again"),
        }
    }

    /// What making its machine is, in words.
    pub fn doing(&self) -> &'static str {
        match &self.from {
            Source::Image(_) => "loading the image",
            Source::Snapshot(_) => "reading the snapshot",
            Source::Elsewhere(..) => "taking the machine",
        }
    }

    /// What a snapshot of its machine says of itself.
    pub fn about(&self, machine: &Machine) -> About {
        match &self.from {
            Source::Image(booted) => About {
                boot: machine.boot_description().unwrap_or_default().to_owned(),
                disks: booted.disks.iter().map(|path| files::name(path)).collect(),
                ..About::default()
            },
            Source::Snapshot(origin) => origin.about().clone(),
            Source::Elsewhere(_, about) => about.clone(),
        }
    }

    /// How its machine came to be, for the report.
    pub fn description(&self, machine: &Machine) -> String {
        match &self.from {
            Source::Image(_) => machine.boot_description().unwrap_or_default().to_owned(),
            Source::Snapshot(origin) => {
                let (file, boot) = (origin.path().display(), &origin.about().boot);
                format!("snapshot {file} ({boot})")
            }
            Source::Elsewhere(from, _) => format!("received from {from}"),
        }
    }
}

impl Booted {
    fn build(&self) -> Result<Machine> {
        let mut builder = Machine::builder()
            .memory(self.memory)
            .cpus(self.cpus)
            .image(self.image.as_slice())
            .name(&self.name)
            .command_line(&self.command_line)
            .vmx(self.vmx.clone())
            .vmcs_layouts(self.layouts.clone())
            .hyperv(self.hyperv);
        if let Some(model) = &self.model {
            builder = builder.model(model);
        }
        if let Some(length) = self.block_length {
            builder = builder.block_length(length);
        }
        if let Some(initrd) = &self.initrd {
            builder = builder.initrd(initrd.as_slice());
        }
        for (name, bytes) in &self.modules {
            builder = builder.module(name, bytes.as_slice());
        }
        for path in &self.disks {
            builder = builder.disk(Disk::open(path)?);
        }
        Ok(builder.build()?)
    }
}

/// The VMX profile that `args` name. A file's is compared with what the processor does here, so that the message
/// names the file.
fn vmx(args: &RunArgs) -> Result<VmxChoice> {
    let path = match &args.vmx {
        Vmx::Named(choice) => return Ok(choice.clone()),
        Vmx::File(path) => path,
    };
    let shown = path.display();
    let bytes = files::read("VMX profile", path)
        .with_context(|| format!("--vmx is none, kvm, max or a file, and not {shown}"))?;
    let of_file = || format!("VMX profile {shown}");
    let choice = VmxChoice::from_dump(&String::from_utf8_lossy(&bytes)).with_context(of_file)?;
    if let Some(model) = model(args) {
        choice.profile(model).with_context(of_file)?;
    }
    Ok(choice)
}

/// The CPU model, where there is one of that name.
fn model(args: &RunArgs) -> Option<&'static Model> {
    let name = args.cpu.clone().unwrap_or_else(|| Config::default().model);
    Model::by_name(&name)
}

/// What names addresses: the symbols that `args` name, or L1's `own`.
fn names(args: &SessionArgs, own: impl FnOnce() -> Option<Symbols>) -> Result<Names> {
    let l1 = match &args.symbols {
        Some(path) => Some(symbols(path)?),
        None => own(),
    };
    let l2 = args.symbols_l2.as_deref().map(symbols).transpose()?;
    Ok(Names::new(l1.map(Arc::new), l2.map(Arc::new)))
}

/// The layouts whose tables are in files, under names that no other has.
pub fn own_layouts(paths: &[PathBuf]) -> Result<Vec<Layout>> {
    let mut own = Vec::new();
    for path in paths {
        let layout = layout_of_file(path)?;
        let name = layout.name();
        if Layout::named(name).is_some() || own.iter().any(|one: &Layout| one.name() == name) {
            let shown = path.display();
            bail!("layout {shown}: there is a layout {name} already; give it another name");
        }
        own.push(layout);
    }
    Ok(own)
}

/// The layout of a name that `option` gave, one of `own` or a built-in one.
pub fn find_layout(option: &str, name: &str, own: &[Layout]) -> Result<Layout> {
    let own = own.iter().find(|layout| layout.name() == name);
    own.or(Layout::named(name)).cloned().with_context(|| {
        format!(
            "{option}: no layout {name:?}; hypernest vmcs layouts lists them, --layout F adds one"
        )
    })
}

/// The layouts of VMCS regions that `args` name, by themselves and with the VMX profile.
fn layouts(args: &RunArgs, vmx: &VmxChoice) -> Result<VmxLayouts> {
    let own = own_layouts(&args.layouts)?;
    let find = |option: &str, name: &str| find_layout(option, name, &own);
    let one = |option: &str, name: &Option<String>| {
        name.as_deref().map(|name| find(option, name)).transpose()
    };
    let further = args.accept_vmcs.iter();
    let layouts = VmxLayouts {
        advertised: one("--vmcs", &args.vmcs)?,
        written: one("--write-vmcs", &args.write_vmcs)?,
        accepted: further
            .map(|name| find("--accept-vmcs", name))
            .collect::<Result<_>>()?,
    };
    if let Some(model) = model(args) {
        vmx.profile_with(model, &layouts)?;
    }
    Ok(layouts)
}

/// The layout whose table is in a file.
pub fn layout_of_file(path: &Path) -> Result<Layout> {
    let of_file = || format!("layout {}", path.display());
    let bytes = files::read("layout", path)?;
    let text = std::str::from_utf8(&bytes).with_context(of_file)?;
    Layout::from_table(text).with_context(of_file)
}

/// The symbols in a file.
pub fn symbols(path: &Path) -> Result<Symbols> {
    let bytes = files::read("symbol file", path)?;
    Symbols::parse(&bytes).with_context(|| format!("symbol file {}", path.display()))
}

/// A raw disk image that stays in its file.
pub struct Disk {
    file: File,
    size: u64,
}

impl Disk {
    /// Opens it.
    ///
    /// # Errors
    /// It is no disk image.
    pub fn open(path: &Path) -> Result<Disk> {
        let shown = path.display();
        let file = File::open(path).with_context(|| format!("cannot read the disk {shown}"))?;
        let data = file
            .metadata()
            .with_context(|| format!("cannot read the disk {shown}"))?;
        if data.is_dir() {
            bail!("cannot read the disk {shown}: it is a directory; give a raw disk image");
        }
        if data.len() == 0 {
            bail!("cannot use the disk {shown}: it is empty; give a raw disk image");
        }
        Ok(Disk {
            file,
            size: data.len(),
        })
    }
}

impl DiskImage for Disk {
    fn size(&self) -> u64 {
        self.size
    }

    #[cfg(unix)]
    fn read(&self, offset: u64, into: &mut [u8]) -> bool {
        use std::os::unix::fs::FileExt;
        self.file.read_exact_at(into, offset).is_ok()
    }

    #[cfg(not(unix))]
    fn read(&self, offset: u64, into: &mut [u8]) -> bool {
        use std::io::{Read, Seek, SeekFrom};
        let mut file = &self.file;
        file.seek(SeekFrom::Start(offset)).is_ok() && file.read_exact(into).is_ok()
    }
}
