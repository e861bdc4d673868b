//! From a description to a machine at its first instruction.

use std::borrow::Cow;

use hypernest_cpu::{MAX_CPUS, Model, PAGE_SIZE, Ram, RamError, VcpuState, VmxChoice, VmxLayouts};

use crate::acpi;
use crate::board::Board;
use crate::boot::{Boot, BootError, Module};
use crate::device::{Device, DeviceError};
use crate::devices::pic::Pic;
use crate::devices::virtio::{Backend, Block, Console, DiskImage};
use crate::engine::{Engine, EngineConfig, EngineError, SoftwareEngine};
use crate::machine::Machine;
use crate::observer::Observer;
use crate::state::Config;

/// Most bytes of RAM.
pub const MAX_MEMORY: u64 = 64 << 30;

/// A machine cannot be built. Each message is one line: what is wrong, where, what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// Not a size RAM can have.
    #[error(
        "{0} bytes of memory: give a multiple of 4096 bytes, at least 1 MiB and at most 64 GiB"
    )]
    Memory(u64),
    /// The host does not have it.
    #[error("the host cannot provide {0} bytes of guest memory; give the guest less")]
    HostMemory(u64),
    /// More or fewer vCPUs than possible.
    #[error("{0} vCPUs: give a number from 1 to {MAX_CPUS}")]
    Cpus(u32),
    /// No CPU model of that name.
    #[error("there is no CPU model {name:?}; choose one of: {known}")]
    Model {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// The image cannot be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A device cannot be added.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The engine refuses.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Files for an image, without an image.
    #[error("a command line, initrd or module is of no use without an image; give an image too")]
    NoImage,
}

/// Makes an engine.
pub type EngineMaker = fn(&EngineConfig) -> Result<Box<dyn Engine>, EngineError>;

enum Extra<'a> {
    Disk(Box<dyn DiskImage>, bool),
    Console,
    Device(Box<dyn Device>),
    File(&'a str, Vec<u8>),
    Item(u16, Vec<u8>),
}

/// Describes a machine; [`MachineBuilder::build`] makes it.
///
/// ```
/// use hypernest_machine::Machine;
/// let machine = Machine::builder().memory(64 << 20).cpus(2).build()?;
/// assert_eq!(machine.vcpus(), 2);
/// # Ok::<(), hypernest_machine::BuildError>(())
/// ```
pub struct MachineBuilder<'a> {
    config: Config,
    image: Option<Cow<'a, [u8]>>,
    raw: bool,
    name: &'a str,
    command_line: &'a str,
    initrd: Option<Cow<'a, [u8]>>,
    modules: Vec<(&'a str, Cow<'a, [u8]>)>,
    extras: Vec<Extra<'a>>,
    observers: Vec<Box<dyn Observer>>,
    sink: Option<SerialSink>,
    block_length: u32,
    engine: EngineMaker,
}

/// Where serial output goes, piece by piece, while the machine runs.
pub type SerialSink = Box<dyn FnMut(&[u8]) + Send>;

impl Default for MachineBuilder<'_> {
    fn default() -> Self {
        MachineBuilder {
            config: Config::default(),
            image: None,
            raw: false,
            name: "",
            command_line: "",
            initrd: None,
            modules: Vec::new(),
            extras: Vec::new(),
            observers: Vec::new(),
            sink: None,
            block_length: 0,
            engine: |config| Ok(Box::new(SoftwareEngine::new(config)?)),
        }
    }
}

impl<'a> MachineBuilder<'a> {
    /// Bytes of RAM, a multiple of 4096 from 1 MiB to [`MAX_MEMORY`]. 512 MiB unless given.
    pub fn memory(mut self, bytes: u64) -> Self {
        self.config.memory = bytes;
        self
    }

    /// Number of vCPUs, 1 to [`MAX_CPUS`]. 1 unless given.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.config.cpus = cpus;
        self
    }

    /// CPU model by name ([`Model::all`] lists them).
    pub fn model(mut self, name: &str) -> Self {
        self.config.model = name.to_owned();
        self
    }

    /// What the real-time clock shows at tick 0, in seconds since 1970. 2026-01-01 unless given.
    pub fn epoch(mut self, seconds: u64) -> Self {
        self.config.epoch = seconds;
        self
    }

    /// The image to boot: bzImage, vmlinux, multiboot 1 or plain ELF; its kind is detected.
    /// Without one, vCPU 0 stands at the reset vector and there is no firmware: give it registers
    /// and memory before it runs.
    pub fn image(mut self, bytes: impl Into<Cow<'a, [u8]>>) -> Self {
        self.image = Some(bytes.into());
        self
    }

    /// Take the image as 16-bit code for 0000:7C00, whatever it looks like.
    pub fn raw(mut self) -> Self {
        self.raw = true;
        self
    }

    /// Name of the image: the first word of a multiboot command line.
    pub fn name(mut self, name: &'a str) -> Self {
        self.name = name;
        self
    }

    /// Command line.
    pub fn command_line(mut self, text: &'a str) -> Self {
        self.command_line = text;
        self
    }

    /// Initial RAM disk.
    pub fn initrd(mut self, bytes: impl Into<Cow<'a, [u8]>>) -> Self {
        self.initrd = Some(bytes.into());
        self
    }

    /// A further module, with what the guest is told of it.
    pub fn module(mut self, text: &'a str, bytes: impl Into<Cow<'a, [u8]>>) -> Self {
        self.modules.push((text, bytes.into()));
        self
    }

    /// A disk on virtio. What the guest writes stays in an overlay in memory.
    pub fn disk(mut self, image: impl DiskImage + 'static) -> Self {
        self.extras.push(Extra::Disk(Box::new(image), false));
        self
    }

    /// A disk on virtio that cannot be written.
    pub fn read_only_disk(mut self, image: impl DiskImage + 'static) -> Self {
        self.extras.push(Extra::Disk(Box::new(image), true));
        self
    }

    /// A console on virtio.
    pub fn console(mut self) -> Self {
        self.extras.push(Extra::Console);
        self
    }

    /// A device of your own.
    pub fn device(mut self, device: impl Device + 'static) -> Self {
        self.extras.push(Extra::Device(Box::new(device)));
        self
    }

    /// A file for guests that read the firmware configuration device.
    pub fn fw_cfg_file(mut self, name: &'a str, content: impl Into<Vec<u8>>) -> Self {
        self.extras.push(Extra::File(name, content.into()));
        self
    }

    /// A numbered item of the firmware configuration device.
    pub fn fw_cfg_item(mut self, item: u16, content: impl Into<Vec<u8>>) -> Self {
        self.extras.push(Extra::Item(item, content.into()));
        self
    }

    /// Looks at what happens, and may change it.
    pub fn observer(mut self, observer: impl Observer + 'static) -> Self {
        self.observers.push(Box::new(observer));
        self
    }

    /// Gets serial output while the machine runs, instead of
    /// [`Machine::take_serial_output`].
    pub fn serial_sink(mut self, sink: impl FnMut(&[u8]) + Send + 'static) -> Self {
        self.sink = Some(Box::new(sink));
        self
    }

    /// Most instructions that are decoded together, 1 to 64. Changes speed and nothing else.
    pub fn block_length(mut self, instructions: u32) -> Self {
        self.block_length = instructions;
        self
    }

    /// Which VMX there is; none where this is not called.
    pub fn vmx(mut self, choice: VmxChoice) -> Self {
        self.config.vmx = choice;
        self
    }

    /// With the Hyper-V interface: CPUID, registers and hypercalls of that hypervisor, and with VMX its
    /// enlightened VMCS. VMX is then without the controls that this has no place for.
    pub fn hyperv(mut self, there: bool) -> Self {
        self.config.hyperv = there;
        self
    }

    /// Which layouts its VMCS regions have; those of the VMX profile where this is not called.
    pub fn vmcs_layouts(mut self, layouts: VmxLayouts) -> Self {
        self.config.layouts = layouts;
        self
    }

    /// Another engine than the software one.
    pub fn engine(mut self, make: EngineMaker) -> Self {
        self.engine = make;
        self
    }

    /// Makes the machine.
    ///
    /// # Errors
    /// When something asked for cannot be; nothing is left behind.
    pub fn build(self) -> Result<Machine, BuildError> {
        let Config { memory, cpus, .. } = self.config;
        if !(1 << 20..=MAX_MEMORY).contains(&memory) || !memory.is_multiple_of(PAGE_SIZE) {
            return Err(BuildError::Memory(memory));
        }
        if !(1..=MAX_CPUS).contains(&cpus) {
            return Err(BuildError::Cpus(cpus));
        }
        let model = Model::by_name(&self.config.model).ok_or_else(|| {
            let names: Vec<&str> = Model::all().iter().map(|model| model.name).collect();
            BuildError::Model {
                name: self.config.model.clone(),
                known: names.join(", "),
            }
        })?;
        let mut board = Board::new(memory, cpus, self.config.epoch);
        for extra in self.extras {
            match extra {
                Extra::Disk(image, read_only) => {
                    board.add_virtio(Backend::Block(Block::new(image, read_only)))?;
                }
                Extra::Console => board.add_virtio(Backend::Console(Console::default()))?,
                Extra::Device(device) => board.add_device(device)?,
                Extra::File(name, content) => board.fw_cfg.set_file(name, content),
                Extra::Item(item, content) => board.fw_cfg.set_item(item, content),
            }
        }
        board.observers = self.observers;
        board.serial_output.sink = self.sink;
        let mut engine = (self.engine)(&EngineConfig {
            cpus,
            model,
            block_length: self.block_length,
            vmx: self.config.vmx.clone(),
            hyperv: self.config.hyperv,
            layouts: self.config.layouts.clone(),
        })?;
        let mut ram = Ram::new(memory).map_err(|error| match error {
            RamError::Host(bytes) => BuildError::HostMemory(bytes),
            _ => BuildError::Memory(memory),
        })?;
        let mut boot = None;
        if let Some(image) = &self.image {
            board.interrupts.pic = Pic::at_boot();
            let tables = acpi::build(cpus, board.virtio.len());
            let modules: Vec<Module<'_>> = self
                .modules
                .iter()
                .map(|(text, bytes)| Module { text, bytes })
                .collect();
            for vcpu in 1..cpus as usize {
                let mut state = engine.read_state(vcpu)?;
                write_back(&mut state);
                engine.write_state(vcpu, &state)?;
            }
            let mut reset = engine.read_state(0)?;
            virtual_wire(&mut reset);
            write_back(&mut reset);
            let booted = Boot {
                image,
                raw: self.raw,
                name: self.name,
                command_line: self.command_line,
                initrd: self.initrd.as_deref(),
                modules: &modules,
                acpi: (!self.raw).then_some(&tables),
            }
            .load(&mut ram, reset)?;
            engine.write_state(0, &booted.state)?;
            boot = Some(format!("{}, entered as {}", booted.kind.name(), booted.how));
        } else if self.initrd.is_some() || !self.modules.is_empty() || !self.command_line.is_empty()
        {
            return Err(BuildError::NoImage);
        }
        Ok(Machine {
            config: self.config,
            ram,
            board,
            engine,
            breakpoints: Vec::new(),
            armed: Vec::new(),
            armed_exits: Default::default(),
            dirty: Default::default(),
            flushes: 0,
            mark: None,
            boot,
        })
    }
}

/// The boot processor's local APIC as a PC's firmware leaves it: the 8259 interrupts through
/// LINT0, LINT1 is NMI (MultiProcessor Specification, "Virtual Wire Mode").
fn virtual_wire(state: &mut VcpuState) {
    const LINT0: usize = 4;
    const LINT1: usize = 5;
    state.apic.svr = 0x1ff;
    state.apic.lvt[LINT0] = 0x8700;
    state.apic.lvt[LINT1] = 0x0400;
}

/// Memory types as firmware leaves them on every processor: all memory write-back (Vol. 3A,
/// "IA32_MTRR_DEF_TYPE MSR": MTRRs and their fixed ranges enabled, default type 6), the fixed
/// ranges below 1 MiB too.
fn write_back(state: &mut VcpuState) {
    const ENABLED: u64 = 1 << 11 | 1 << 10;
    const WRITE_BACK: u64 = 6;
    state.msrs.mtrr_def_type = ENABLED | WRITE_BACK;
    state.msrs.mtrr_fixed = [0x0606_0606_0606_0606; 11];
}
