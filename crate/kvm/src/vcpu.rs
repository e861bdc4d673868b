//! One VM of the host's kernel with one vCPU.
#![expect(
    unsafe_code,
    reason = "the kernel maps guest RAM by address; kvm-ioctls marks that call unsafe"
)]

use std::time::Instant;

use hypernest_cpu::{Activity, Bus, Ram, Tick, VcpuState};
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use crate::convert::{MSRS, from_fpu, from_regs, from_sregs, to_fpu, to_regs, to_sregs};

/// KVM cannot be used, or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvmError {
    /// An ioctl failed.
    #[error("{what}: {error}")]
    Ioctl {
        /// What was asked of the kernel.
        what: &'static str,
        /// Its answer.
        error: kvm_ioctls::Error,
    },
    /// The kernel gave up on the guest.
    #[error("KVM cannot go on: {0}")]
    Exit(String),
    /// The vCPU state has parts that this engine cannot take.
    #[error("KVM cannot take {0}")]
    State(&'static str),
}

fn ioctl<T>(what: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, KvmError> {
    result.map_err(|error| KvmError::Ioctl { what, error })
}

/// Why [`KvmVcpu::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmStop {
    /// The time asked for has passed.
    Deadline,
    /// The board wants the engine to return.
    Board,
    /// HLT, and nobody is there to wake the vCPU.
    Idle,
    /// Triple fault.
    Shutdown,
}

/// A vCPU of the host's kernel. It has no local APIC: interrupts are not delivered, which is
/// enough for guests that poll.
pub struct KvmVcpu {
    vcpu: VcpuFd,
    // The VM outlives its vCPU; it is here to be dropped with it.
    _vm: VmFd,
    start: Instant,
    halted: bool,
}

impl KvmVcpu {
    /// A VM that sees `ram` as guest-physical memory.
    ///
    /// # Safety
    /// `ram` must live as long as the vCPU, and stay where it is (as its allocation does). While
    /// [`KvmVcpu::run`] runs, nobody else may touch it.
    pub unsafe fn new(ram: &mut Ram) -> Result<KvmVcpu, KvmError> {
        let kvm = ioctl("open /dev/kvm", Kvm::new())?;
        let vm = ioctl("KVM_CREATE_VM", kvm.create_vm())?;
        let base = ram.as_ptr() as u64;
        let ranges = [
            (0, ram.low_size(), base),
            (Ram::HOLE_END, ram.high_size(), base + ram.low_size()),
        ];
        for (slot, (address, size, host)) in ranges.into_iter().enumerate() {
            if size == 0 {
                continue;
            }
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: address,
                memory_size: size,
                userspace_addr: host,
            };
            // SAFETY: the range is guest RAM, which the caller keeps alive and in place.
            ioctl("KVM_SET_USER_MEMORY_REGION", unsafe {
                vm.set_user_memory_region(region)
            })?;
        }
        let vcpu = ioctl("KVM_CREATE_VCPU", vm.create_vcpu(0))?;
        let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES);
        ioctl(
            "KVM_SET_CPUID2",
            vcpu.set_cpuid2(&ioctl("KVM_GET_SUPPORTED_CPUID", cpuid)?),
        )?;
        Ok(KvmVcpu {
            vcpu,
            _vm: vm,
            start: Instant::now(),
            halted: false,
        })
    }

    /// Wall time since the start, a tick a nanosecond: KVM counts no instructions.
    pub fn now(&self) -> Tick {
        self.start.elapsed().as_nanos() as Tick
    }

    /// Runs until a reason to stop. `until` is looked at when the guest leaves to the board: a guest
    /// that never does is not interrupted.
    pub fn run(
        &mut self,
        ram: &mut Ram,
        bus: &mut dyn Bus,
        until: Tick,
    ) -> Result<KvmStop, KvmError> {
        self.halted = false;
        loop {
            let now = self.start.elapsed().as_nanos() as Tick;
            bus.advance(ram, now);
            if bus.stop_requested() {
                self.settle()?;
                return Ok(KvmStop::Board);
            }
            if now >= until {
                self.settle()?;
                return Ok(KvmStop::Deadline);
            }
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, data)) => {
                    let width = data.len() as u8;
                    bus.port_write(ram, now, port, width, value(data) as u32);
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    let read = bus.port_read(ram, now, port, data.len() as u8);
                    fill(data, u64::from(read));
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    bus.mmio_write(ram, now, address, data.len() as u8, value(data));
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    let read = bus.mmio_read(ram, now, address, data.len() as u8);
                    fill(data, read);
                }
                Ok(VcpuExit::Hlt) => {
                    self.halted = true;
                    return Ok(KvmStop::Idle);
                }
                Ok(VcpuExit::Shutdown) => return Ok(KvmStop::Shutdown),
                Ok(VcpuExit::Intr) => (),
                Ok(other) => return Err(KvmError::Exit(format!("{other:?}"))),
                Err(error) if error.errno() == 4 => (), // EINTR
                Err(error) => {
                    let what = "KVM_RUN";
                    return Err(KvmError::Ioctl { what, error });
                }
            }
        }
    }

    /// Lets the kernel finish a port or MMIO access that has been answered, without running the
    /// guest any further (api.rst, KVM_RUN, `immediate_exit`).
    fn settle(&mut self) -> Result<(), KvmError> {
        self.vcpu.set_kvm_immediate_exit(1);
        let result = self.vcpu.run().map(|_| ());
        self.vcpu.set_kvm_immediate_exit(0);
        match result {
            Err(error) if error.errno() != 4 => Err(KvmError::Ioctl {
                what: "KVM_RUN",
                error,
            }),
            _ => Ok(()),
        }
    }

    /// Reads registers into `state`; what KVM does not hold stays as it is.
    pub fn read_state(&self, state: &mut VcpuState) -> Result<(), KvmError> {
        from_regs(state, &ioctl("KVM_GET_REGS", self.vcpu.get_regs())?);
        from_sregs(state, &ioctl("KVM_GET_SREGS", self.vcpu.get_sregs())?);
        from_fpu(state, &ioctl("KVM_GET_FPU", self.vcpu.get_fpu())?);
        let entries: Vec<_> = MSRS
            .iter()
            .map(|(index, _)| kvm_msr_entry {
                index: *index,
                ..kvm_msr_entry::default()
            })
            .collect();
        let mut msrs = msrs(&entries)?;
        ioctl("KVM_GET_MSRS", self.vcpu.get_msrs(&mut msrs))?;
        for (entry, (_, field)) in msrs.as_slice().iter().zip(MSRS) {
            *field(state) = entry.data;
        }
        state.activity = if self.halted {
            Activity::Halted
        } else {
            Activity::Active
        };
        Ok(())
    }

    /// Writes registers. State that lives in the local APIC is not taken.
    pub fn write_state(&mut self, state: &VcpuState) -> Result<(), KvmError> {
        if !matches!(state.activity, Activity::Active | Activity::Halted) {
            return Err(KvmError::State(
                "a vCPU that is shut down or waits for start-up",
            ));
        }
        let before = ioctl("KVM_GET_SREGS", self.vcpu.get_sregs())?;
        let sregs = to_sregs(state, before);
        ioctl("KVM_SET_SREGS", self.vcpu.set_sregs(&sregs))?;
        ioctl("KVM_SET_REGS", self.vcpu.set_regs(&to_regs(state)))?;
        ioctl("KVM_SET_FPU", self.vcpu.set_fpu(&to_fpu(&state.fpu)))?;
        let mut copy = state.clone();
        let entries: Vec<_> = MSRS
            .iter()
            .map(|(index, field)| kvm_msr_entry {
                index: *index,
                data: *field(&mut copy),
                ..kvm_msr_entry::default()
            })
            .collect();
        let written = ioctl("KVM_SET_MSRS", self.vcpu.set_msrs(&msrs(&entries)?))?;
        if written != entries.len() {
            return Err(KvmError::State("one of the MSRs"));
        }
        Ok(())
    }
}

fn msrs(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries).map_err(|_| KvmError::State("that many MSRs"))
}

fn value(data: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    let n = data.len().min(8);
    bytes[..n].copy_from_slice(&data[..n]);
    u64::from_le_bytes(bytes)
}

fn fill(data: &mut [u8], value: u64) {
    let bytes = value.to_le_bytes();
    let n = data.len().min(8);
    data[..n].copy_from_slice(&bytes[..n]);
}
