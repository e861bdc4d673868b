//! The host's processor as a judge: a traced process that executes one instruction at a time.
//!
//! The process is an ELF image of one page. The tracer maps the regions of [`crate::layout`] into
//! it and unmaps everything else, so an instruction can touch only what a case gives it.
#![expect(
    unsafe_code,
    reason = "ptrace and mmap have no safe interface; the traced process shares nothing but the memory image"
)]

use std::fs::File;
use std::io::{Error, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use hypernest_cpu::FpuState;
use iced_x86::{CpuidFeature, Decoder, DecoderOptions};
use libc::{c_int, c_void, user_regs_struct};

use crate::case::{Case, Engine, Event, ID, Mode, Outcome, RF, TF, UserState, initial_memory};
use crate::elf;
use crate::layout::{CODE, IMAGE, IMAGE_DATA, REGIONS, STACK, image_offset};

/// End of user space with 4-level paging, less the guard page.
const TASK_END: u64 = 0x7fff_ffff_f000;

/// The host's processor cannot be asked.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {error}")]
pub struct Unavailable {
    what: &'static str,
    error: Error,
}

fn check(what: &'static str, result: i64) -> Result<i64, Unavailable> {
    if result < 0 {
        let error = Error::last_os_error();
        Err(Unavailable { what, error })
    } else {
        Ok(result)
    }
}

/// A traced process. It belongs to the thread that made it (ptrace's rule), and dies with it.
pub struct Host {
    child: Child,
    image: *mut u8,
    /// The FPU registers the process has now, to save setting them again.
    fpu: FpuArea,
    code_len: usize,
    code_at: usize,
}

/// FXSAVE area (Vol. 1, "FXSAVE Area").
#[repr(C, align(16))]
#[derive(Clone, PartialEq, Eq)]
struct FpuArea([u8; 512]);

impl Host {
    /// Starts the process. Fails where ptrace is refused.
    pub fn new() -> Result<Host, Unavailable> {
        let mut program = memfd("hypernest-oracle-program")?;
        let io = |what| move |error| Unavailable { what, error };
        program
            .write_all(&elf::image())
            .map_err(io("memfd write"))?;
        let memory = memfd("hypernest-oracle-memory")?;
        memory.set_len(IMAGE as u64).map_err(io("memfd size"))?;
        let memory_fd = memory.as_raw_fd();
        // SAFETY: a fresh shared mapping of a file of exactly this size.
        let image = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                IMAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                memory_fd,
                0,
            )
        };
        if image == libc::MAP_FAILED {
            return Err(io("mmap")(Error::last_os_error()));
        }

        let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
        command
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // SAFETY: only system calls between fork and exec.
        unsafe {
            command.pre_exec(move || {
                let refused = libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) < 0
                    || libc::fcntl(memory_fd, libc::F_SETFD, 0) < 0;
                if refused {
                    return Err(Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().map_err(io("starting a traced process"))?;
        let mut host = Host {
            child,
            image: image.cast(),
            fpu: FpuArea([0; 512]),
            code_len: 0,
            code_at: 0,
        };
        host.wait("first stop")?;
        host.ptrace(
            "PTRACE_SETOPTIONS",
            libc::PTRACE_SETOPTIONS,
            0,
            libc::PTRACE_O_EXITKILL as usize as *mut c_void,
        )?;
        host.arrange_memory(memory_fd)?;
        host.read_fpu()?;
        Ok(host)
    }

    /// Keeps this thread and the process on one CPU: handing over between two costs several times
    /// the step itself.
    pub fn pin(&self) {
        // SAFETY: `cpu_set_t` is plain data, and the sizes are its own.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(libc::sched_getcpu().max(0) as usize, &mut set);
            libc::sched_setaffinity(0, size_of_val(&set), &set);
            libc::sched_setaffinity(self.pid(), size_of_val(&set), &set);
        }
    }

    fn pid(&self) -> libc::pid_t {
        self.child.id() as libc::pid_t
    }

    fn ptrace(
        &self,
        what: &'static str,
        request: libc::c_uint,
        address: usize,
        data: *mut c_void,
    ) -> Result<i64, Unavailable> {
        // SAFETY: every caller passes `data` as its request wants it, pointing to live memory.
        check(what, unsafe {
            libc::ptrace(request, self.pid(), address, data)
        })
    }

    /// Waits for a stop and gives its signal.
    fn wait(&self, what: &'static str) -> Result<c_int, Unavailable> {
        let mut status = 0;
        // SAFETY: `status` outlives the call.
        let waited = unsafe { libc::waitpid(self.pid(), &mut status, libc::__WALL) };
        check(what, waited.into())?;
        if libc::WIFSTOPPED(status) {
            Ok(libc::WSTOPSIG(status))
        } else {
            let error = Error::other(format!("the traced process ended, status {status:#x}"));
            Err(Unavailable { what, error })
        }
    }

    fn read_registers(&self) -> Result<user_regs_struct, Unavailable> {
        // SAFETY: plain data, filled by the kernel.
        let mut registers: user_regs_struct = unsafe { std::mem::zeroed() };
        let data = (&raw mut registers).cast();
        self.ptrace("PTRACE_GETREGS", libc::PTRACE_GETREGS, 0, data)?;
        Ok(registers)
    }

    fn write_registers(&self, registers: &user_regs_struct) -> Result<(), Unavailable> {
        let data = (&raw const *registers).cast_mut().cast();
        self.ptrace("PTRACE_SETREGS", libc::PTRACE_SETREGS, 0, data)?;
        Ok(())
    }

    fn read_fpu(&mut self) -> Result<(), Unavailable> {
        let data = (&raw mut self.fpu).cast();
        self.ptrace("PTRACE_GETFPREGS", libc::PTRACE_GETFPREGS, 0, data)?;
        Ok(())
    }

    fn step(&self) -> Result<c_int, Unavailable> {
        let none = std::ptr::null_mut();
        self.ptrace("PTRACE_SINGLESTEP", libc::PTRACE_SINGLESTEP, 0, none)?;
        self.wait("single step")
    }

    /// Executes a system call in the process, with the SYSCALL instruction at `at`.
    fn remote(&self, at: u64, number: i64, arguments: [u64; 6]) -> Result<(), Unavailable> {
        let mut registers = self.read_registers()?;
        registers.rip = at;
        registers.rax = number as u64;
        registers.orig_rax = u64::MAX;
        [
            registers.rdi,
            registers.rsi,
            registers.rdx,
            registers.r10,
            registers.r8,
            registers.r9,
        ] = arguments;
        self.write_registers(&registers)?;
        self.step()?;
        let result = self.read_registers()?.rax as i64;
        if (-4095..0).contains(&result) {
            let error = Error::from_raw_os_error(-result as i32);
            return Err(Unavailable {
                what: "a system call in the traced process",
                error,
            });
        }
        Ok(())
    }

    fn arrange_memory(&mut self, fd: c_int) -> Result<(), Unavailable> {
        let unmap = |from: u64, to: u64| [from, to - from, 0, 0, 0, 0];
        let after = elf::BASE + 0x1000;
        self.remote(elf::SYSCALL, libc::SYS_munmap, unmap(after, TASK_END))?;
        let mut offset = 0;
        for region in REGIONS {
            let mut protection = libc::PROT_READ;
            if region.write {
                protection |= libc::PROT_WRITE;
            }
            if region.execute {
                protection |= libc::PROT_EXEC;
            }
            let arguments = [
                region.start,
                region.len(),
                protection as u64,
                (libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE) as u64,
                fd as u64,
                offset,
            ];
            self.remote(elf::SYSCALL, libc::SYS_mmap, arguments)?;
            offset += region.len();
        }
        self.image_mut()[..2].copy_from_slice(&[0x0f, 0x05]);
        self.remote(CODE.start, libc::SYS_munmap, unmap(elf::BASE, after))?;
        self.image_mut().fill(0);
        Ok(())
    }

    fn image(&self) -> &[u8] {
        // SAFETY: the mapping lives as long as `self`; the process is stopped whenever we look.
        unsafe { std::slice::from_raw_parts(self.image, IMAGE) }
    }

    fn image_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `image`.
        unsafe { std::slice::from_raw_parts_mut(self.image, IMAGE) }
    }

    fn execute(&mut self, case: &Case) -> Result<Outcome, Unavailable> {
        initial_memory(case, &mut self.image_mut()[IMAGE_DATA..]);
        self.place_code(case);
        let fpu = pack_fpu(&case.state.fpu, &self.fpu);
        if fpu != self.fpu {
            let data = (&raw const fpu).cast_mut().cast();
            self.ptrace("PTRACE_SETFPREGS", libc::PTRACE_SETFPREGS, 0, data)?;
        }
        self.write_registers(&pack_registers(&case.state))?;
        let signal = self.step()?;
        let registers = self.read_registers()?;
        self.read_fpu()?;
        let mut state = UserState {
            fpu: unpack_fpu(&self.fpu, &case.state.fpu),
            ..unpack_registers(&registers)
        };
        // TF and RF are the stepping's own.
        state.rflags &= !(TF | RF);
        let event = self.event(case, signal, &state)?;
        if matches!(opcode(case), 0x9c) && event == Event::Done {
            // PUSHF shows the TF of the stepping.
            if let Some(at) = image_offset(state.gpr[4].wrapping_add(1)) {
                self.image_mut()[at] &= !1;
            }
        }
        if state.rflags & ID != 0 {
            self.clear_id()?;
        }
        Ok(Outcome { event, state })
    }

    /// Takes RFLAGS.ID away again, which ptrace cannot, by a POPF of a zero. Leaves the memory image
    /// as it is.
    fn clear_id(&mut self) -> Result<(), Unavailable> {
        let code = self.image()[0];
        self.image_mut()[0] = 0x9d;
        let stack = image_offset(STACK.start).unwrap_or(0);
        let mut saved = [0; 8];
        saved.copy_from_slice(&self.image()[stack..stack + 8]);
        self.image_mut()[stack..stack + 8].fill(0);
        let mut state = UserState::new(Mode::Long);
        state.rip = CODE.start;
        state.gpr[4] = STACK.start;
        self.write_registers(&pack_registers(&state))?;
        self.step()?;
        self.image_mut()[0] = code;
        self.image_mut()[stack..stack + 8].copy_from_slice(&saved);
        Ok(())
    }

    fn place_code(&mut self, case: &Case) {
        let (old_at, old_len) = (self.code_at, self.code_len);
        self.image_mut()[old_at..old_at + old_len].fill(0x90);
        let code = case.mapped_code();
        let at = image_offset(case.state.rip).unwrap_or(0);
        self.image_mut()[at..at + code.len()].copy_from_slice(code);
        // What follows is NOPs, for the instruction after a MOV SS shadow.
        let end = (at + code.len() + 16).min(IMAGE_DATA);
        self.image_mut()[at + code.len()..end].fill(0x90);
        self.code_at = at;
        self.code_len = end - at;
    }

    /// The exception behind a signal (Linux, arch/x86/kernel/traps.c).
    fn event(&self, case: &Case, signal: c_int, state: &UserState) -> Result<Event, Unavailable> {
        const SI_KERNEL: c_int = 0x80;
        const FPE_INTDIV: c_int = 1;
        // SAFETY: plain data, filled by the kernel.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let data = (&raw mut info).cast();
        self.ptrace("PTRACE_GETSIGINFO", libc::PTRACE_GETSIGINFO, 0, data)?;
        let kernel = info.si_code == SI_KERNEL;
        let mut address = None;
        let opcode = opcode(case);
        let vector = match signal {
            libc::SIGTRAP if !kernel => return Ok(Event::Done),
            libc::SIGTRAP => 3,
            libc::SIGILL => 6,
            // #DE has a code that no floating-point exception has. The error summary may be set
            // without #MF being the cause: only what waits for the x87 raises that.
            libc::SIGFPE if info.si_code == FPE_INTDIV => 0,
            libc::SIGFPE if waits_for_x87(case) && state.fpu.status & 0x80 != 0 => 16,
            libc::SIGFPE => 19,
            libc::SIGSEGV if !kernel => {
                // SAFETY: SIGSEGV carries an address.
                address = Some(unsafe { info.si_addr() } as u64);
                14
            }
            // INTO and BOUND leave the same signal as #GP.
            libc::SIGSEGV if opcode == 0xce => 4,
            libc::SIGSEGV if opcode == 0x62 && case.mode == Mode::Compat => 5,
            libc::SIGSEGV => 13,
            libc::SIGBUS if kernel => 12,
            libc::SIGBUS => 17,
            _ => {
                let error = Error::other(format!("signal {signal} after {:x?}", case.code));
                return Err(Unavailable {
                    what: "single step",
                    error,
                });
            }
        };
        Ok(Event::Fault { vector, address })
    }
}

impl Engine for Host {
    fn name(&self) -> &'static str {
        "host"
    }

    /// Panics when the process is lost: a test cannot go on without its judge.
    fn run(&mut self, case: &Case) -> Outcome {
        match self.execute(case) {
            Ok(outcome) => outcome,
            Err(error) => panic!("{error} (case {})", crate::text::print(case, None, &[])),
        }
    }

    fn memory(&self) -> &[u8] {
        &self.image()[IMAGE_DATA..]
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The process may be gone already; there is nothing to do about a failure either way.
        let _ = self.child.kill();
        let _ = self.child.wait();
        // SAFETY: mapped in `new` with this size, and no reference outlives `self`.
        unsafe { libc::munmap(self.image.cast(), IMAGE) };
    }
}

fn memfd(name: &'static str) -> Result<File, Unavailable> {
    let name = std::ffi::CString::new(name).unwrap_or_default();
    // SAFETY: `name` ends with NUL; the descriptor is ours alone.
    unsafe {
        let fd = check(
            "memfd_create",
            libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC).into(),
        )?;
        Ok(File::from_raw_fd(fd as c_int))
    }
}

fn opcode(case: &Case) -> u8 {
    let is_prefix = |byte: &&u8| {
        matches!(
            **byte,
            0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3
        ) || (case.mode == Mode::Long && matches!(**byte, 0x40..=0x4f))
    };
    case.code
        .iter()
        .find(|b| !is_prefix(b))
        .copied()
        .unwrap_or(0)
}

/// The status word with the summary and busy bits that its exceptions give. The host makes them so
/// on loading, but shows the word as it was given where it saw no reason to save it again.
fn summarized(fpu: &FpuState) -> u16 {
    const SUMMARY: u16 = 0x8080;
    let pending = fpu.status & !fpu.control & 0x3f != 0;
    fpu.status & !SUMMARY | if pending { SUMMARY } else { 0 }
}

/// Whether the instruction is one of x87 or MMX, which report pending x87 exceptions first.
fn waits_for_x87(case: &Case) -> bool {
    let i = Decoder::new(case.mode.bits(), &case.code, DecoderOptions::NONE).decode();
    let uses_mmx = (0..i.op_count()).any(|n| i.op_register(n).is_mm());
    matches!(opcode(case), 0x9b | 0xd8..=0xdf)
        || uses_mmx
        || i.cpuid_features().contains(&CpuidFeature::MMX)
}

fn pack_registers(state: &UserState) -> user_regs_struct {
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = state.gpr;
    let [es, cs, ss, ds, fs, gs] = state.selectors.map(u64::from);
    user_regs_struct {
        r15,
        r14,
        r13,
        r12,
        rbp,
        rbx,
        r11,
        r10,
        r9,
        r8,
        rax,
        rcx,
        rdx,
        rsi,
        rdi,
        orig_rax: u64::MAX,
        rip: state.rip,
        cs,
        eflags: state.rflags,
        rsp,
        ss,
        fs_base: state.fs_base,
        gs_base: state.gs_base,
        ds,
        es,
        fs,
        gs,
    }
}

fn unpack_registers(r: &user_regs_struct) -> UserState {
    UserState {
        gpr: [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15,
        ],
        rip: r.rip,
        rflags: r.eflags,
        selectors: [r.es, r.cs, r.ss, r.ds, r.fs, r.gs].map(|s| s as u16),
        fs_base: r.fs_base,
        gs_base: r.gs_base,
        ..UserState::new(Mode::Long)
    }
}

fn pack_fpu(fpu: &FpuState, old: &FpuArea) -> FpuArea {
    let mut area = FpuArea([0; 512]);
    let mut put = |at: usize, bytes: &[u8]| area.0[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &fpu.control.to_le_bytes());
    put(2, &summarized(fpu).to_le_bytes());
    put(4, &[fpu.tag]);
    put(6, &fpu.opcode.to_le_bytes());
    put(8, &fpu.instruction.to_le_bytes());
    put(16, &fpu.operand.to_le_bytes());
    put(24, &fpu.mxcsr.to_le_bytes());
    put(28, &old.0[28..32]);
    for (i, st) in fpu.st.iter().enumerate() {
        put(32 + 16 * i, st);
    }
    for (i, xmm) in fpu.xmm.iter().enumerate() {
        put(160 + 16 * i, &xmm.to_le_bytes());
    }
    area
}

fn unpack_fpu(area: &FpuArea, before: &FpuState) -> FpuState {
    fn get<const N: usize>(area: &FpuArea, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&area.0[at..at + N]);
        bytes
    }
    let mut fpu = *before;
    fpu.control = u16::from_le_bytes(get(area, 0));
    fpu.status = u16::from_le_bytes(get(area, 2));
    fpu.tag = area.0[4];
    fpu.opcode = u16::from_le_bytes(get(area, 6));
    fpu.instruction = u64::from_le_bytes(get(area, 8));
    fpu.operand = u64::from_le_bytes(get(area, 16));
    fpu.mxcsr = u32::from_le_bytes(get(area, 24));
    for (i, st) in fpu.st.iter_mut().enumerate() {
        *st = get(area, 32 + 16 * i);
    }
    for (i, xmm) in fpu.xmm.iter_mut().enumerate() {
        *xmm = u128::from_le_bytes(get(area, 160 + 16 * i));
    }
    fpu
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Option<Host> {
        Host::new()
            .inspect_err(|error| println!("skipped: no host engine: {error}"))
            .ok()
    }

    fn case(code: &[u8]) -> Case {
        Case {
            mode: Mode::Long,
            code: code.to_vec(),
            state: UserState::new(Mode::Long),
            memory: Vec::new(),
        }
    }

    #[test]
    fn add_carries_out_of_al() {
        let Some(mut host) = host() else { return };
        let mut case = case(&[0x04, 0x01]);
        case.state.gpr[0] = 0xff;
        let outcome = host.run(&case);
        assert_eq!(outcome.event, Event::Done);
        let mut expected = case.state.clone();
        expected.gpr[0] = 0;
        expected.rip += 2;
        expected.rflags = 0x202 | 1 | 4 | 0x10 | 0x40;
        assert_eq!(outcome.state, expected);
    }

    #[test]
    fn faults_have_their_vectors_and_addresses() {
        let Some(mut host) = host() else { return };
        let fault = |vector, address| Event::Fault { vector, address };
        for (code, event) in [
            (&[0x0f, 0x0b][..], fault(6, None)),
            (&[0xf7, 0xf0], fault(0, None)),
            (&[0xcc], fault(3, None)),
            (&[0xf4], fault(13, None)),
            (
                &[0x8b, 0x04, 0x25, 0x34, 0x12, 0, 0],
                fault(14, Some(0x1234)),
            ),
            (
                &[0xa2, 0, 0x40, 0x20, 0, 0, 0, 0, 0],
                fault(14, Some(0x20_4000)),
            ),
            (&[0xa0, 0, 0x40, 0x20, 0, 0, 0, 0, 0], Event::Done),
        ] {
            assert_eq!(host.run(&case(code)).event, event, "{code:x?}");
        }
    }

    #[test]
    fn a_32_bit_code_segment_truncates_registers() {
        let Some(mut host) = host() else { return };
        let mut case = case(&[0x40]);
        case.mode = Mode::Compat;
        case.state = UserState::new(Mode::Compat);
        let outcome = host.run(&case);
        assert_eq!((outcome.event, outcome.state.gpr[0]), (Event::Done, 1));
        assert_eq!(outcome.state.selectors, case.state.selectors);
    }
}
