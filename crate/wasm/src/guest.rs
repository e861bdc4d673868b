//! A machine as a page drives it: in slices, with serial bytes in and out.

use hypernest_machine::boot::ImageKind;
use hypernest_machine::{BuildError, MAX_CPUS, Machine, Model, Stop, Tick, Until, VmxChoice};
use serde::{Deserialize, Serialize};

/// Most bytes of guest RAM: WebAssembly has 4 GiB for all.
pub const MAX_MEMORY: u64 = 3 << 30;

/// A guest that needs nothing fetched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Builtin {
    /// A hypervisor and its guest: see [`hypernest_guests::HYPERVISOR`]. It needs [`Vmx::Max`].
    #[default]
    Hypervisor,
    /// It echoes what is typed: see [`hypernest_guests::GREETING`].
    Greeting,
}

/// Which VMX the processor has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Vmx {
    /// None.
    #[default]
    None,
    /// What KVM offers its guests.
    Kvm,
    /// All that there is.
    Max,
}

/// What machine to build.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// Bytes of guest RAM, a multiple of 4096 up to [`MAX_MEMORY`].
    pub memory: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// CPU model by name; the default where there is none.
    #[serde(default)]
    pub model: Option<String>,
    /// Command line.
    pub cmdline: String,
    /// VMX; none where it is left out.
    #[serde(default)]
    pub vmx: Vmx,
    /// What runs where there is no kernel.
    #[serde(default)]
    pub builtin: Builtin,
}

impl Options {
    /// Checks what can be known without an image and without memory.
    ///
    /// # Errors
    /// One line for the user.
    pub fn check(&self) -> Result<(), String> {
        if self.memory > MAX_MEMORY {
            return Err(format!(
                "{:.1} GiB of memory: a guest in a browser can have at most 3 GiB; give it less",
                self.memory as f64 / f64::from(1 << 30)
            ));
        }
        if self.memory < 1 << 20 || !self.memory.is_multiple_of(4096) {
            return Err(BuildError::Memory(self.memory).to_string());
        }
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(BuildError::Cpus(self.cpus).to_string());
        }
        match &self.model {
            Some(name) if Model::by_name(name).is_none() => {
                let known: Vec<&str> = Model::all().iter().map(|model| model.name).collect();
                let (name, known) = (name.clone(), known.join(", "));
                Err(BuildError::Model { name, known }.to_string())
            }
            _ => Ok(()),
        }
    }
}

/// The machine after a slice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SliceReport {
    /// Machine time.
    pub ticks: u64,
    /// Instructions executed since boot.
    pub instructions: u64,
    /// VM exits since boot.
    pub exits: u64,
    /// Why the machine cannot go on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop: Option<StopReport>,
}

/// Why a machine stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StopReport {
    /// One stable word.
    pub kind: &'static str,
    /// One line for the user.
    pub message: String,
}

/// A machine that has booted an image.
pub struct Guest {
    pub(crate) machine: Machine,
    /// How it was booted.
    pub(crate) boot: String,
    stop: Option<StopReport>,
}

impl Guest {
    /// Builds a machine and loads `kernel`, or the built-in guest where there is none.
    ///
    /// # Errors
    /// What is wrong with the options or the images, in one line for the user.
    pub fn new(
        options: &Options,
        kernel: Option<&[u8]>,
        initrd: Option<&[u8]>,
    ) -> Result<Guest, String> {
        options.check()?;
        let builtin = match options.builtin {
            Builtin::Hypervisor => hypernest_guests::HYPERVISOR,
            Builtin::Greeting => hypernest_guests::GREETING,
        };
        let mut builder = Machine::builder()
            .memory(options.memory)
            .cpus(options.cpus)
            .name("kernel")
            .image(kernel.unwrap_or(builtin))
            .command_line(&options.cmdline)
            .vmx(match options.vmx {
                Vmx::None => VmxChoice::None,
                Vmx::Kvm => VmxChoice::Kvm,
                Vmx::Max => VmxChoice::Max,
            });
        if let Some(model) = &options.model {
            builder = builder.model(model);
        }
        if let Some(initrd) = initrd {
            builder = builder.initrd(initrd);
        }
        let machine = builder.build().map_err(|error| error.to_string())?;
        let boot = machine.boot_description().unwrap_or_default().to_owned();
        Ok(Guest::of(machine, boot))
    }

    /// A machine that was booted as `boot` says.
    pub(crate) fn of(machine: Machine, boot: String) -> Guest {
        Guest {
            machine,
            boot,
            stop: None,
        }
    }

    /// Runs until `ticks` have passed, at least `instructions` have been executed (hardly more), or
    /// the machine stops. Idle time is skipped; a stopped machine stays where it is.
    pub fn run_slice(&mut self, ticks: Tick, instructions: u64) -> SliceReport {
        let end = self.machine.now().saturating_add(ticks);
        let enough = self.instructions().saturating_add(instructions);
        while self.stop.is_none() && self.machine.now() < end && self.instructions() < enough {
            // While the guest executes, a tick is an instruction; a skip before that is free.
            let begin = self.machine.now().max(self.waits_until());
            let until = begin.saturating_add(enough - self.instructions()).min(end);
            self.stop = match self.machine.run(&Until::tick(until)) {
                Ok(Stop::Tick) => None,
                Ok(stop) => Some(StopReport {
                    kind: stop.word(),
                    message: match stop {
                        Stop::TripleFault { .. } => sentence(&format!(
                            "{stop}, which resets a PC (Linux reboots this way with reboot=t)"
                        )),
                        _ => sentence(&stop.to_string()),
                    },
                }),
                Err(error) => Some(StopReport {
                    kind: "failed",
                    message: sentence(&error.to_string()),
                }),
            };
        }
        SliceReport {
            ticks: self.machine.now(),
            instructions: self.instructions(),
            exits: self.machine.exit_statistics().map_or(0, |s| s.exits()),
            stop: self.stop.clone(),
        }
    }

    fn instructions(&self) -> u64 {
        self.machine.instructions().unwrap_or(0)
    }

    /// The tick until which every vCPU waits; 0 while one can run.
    fn waits_until(&self) -> Tick {
        self.machine.waits_until().unwrap_or(0)
    }

    /// Ticks for which the machine has nothing to do unless input arrives; 0 while it is busy.
    pub fn idle_ticks(&self) -> Tick {
        self.waits_until().saturating_sub(self.machine.now())
    }

    /// Takes what the guest has written to its serial port since the last call.
    pub fn take_serial(&mut self) -> Vec<u8> {
        self.machine.take_serial_output()
    }

    /// Types `bytes` at the serial port; they wait there until the guest reads them.
    pub fn send_serial(&mut self, bytes: &[u8]) {
        self.machine.serial_input(bytes);
    }

    /// Hash over the whole state, 16 hexadecimal digits.
    ///
    /// # Errors
    /// Only when an engine cannot read its state; the software engine always can.
    pub fn state_hash(&self) -> Result<String, String> {
        let hash = self.machine.state_hash().map_err(|e| e.to_string())?;
        Ok(format!("{hash:016x}"))
    }
}

/// A lower-case phrase as a sentence.
fn sentence(phrase: &str) -> String {
    let mut letters = phrase.chars();
    let first = letters.next().map(|c| c.to_ascii_uppercase());
    first.into_iter().chain(letters).chain(['.']).collect()
}

/// Whether a file that begins with `head` is an initial RAM disk: a cpio archive, or compressed.
/// (Kernels are compressed inside, never as a whole.)
pub fn is_initrd(head: &[u8]) -> bool {
    const MAGICS: [&[u8]; 8] = [
        b"070701",     // cpio, "newc"
        b"070702",     // cpio, "newc" with checksums
        &[0x1f, 0x8b], // gzip
        &[0xfd, b'7', b'z', b'X', b'Z', 0],
        &[0x28, 0xb5, 0x2f, 0xfd], // Zstandard
        &[0x02, 0x21, 0x4c, 0x18], // LZ4, legacy frames, as Linux packs it
        b"BZh",
        &[0x89, b'L', b'Z', b'O'],
    ];
    MAGICS.iter().any(|magic| head.starts_with(magic))
}

/// Checks that `image` is of a kind that can be booted.
///
/// # Errors
/// What it is instead, or what is wrong with it, in one line.
pub fn check_kernel(image: &[u8]) -> Result<(), String> {
    match ImageKind::detect(image) {
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}
