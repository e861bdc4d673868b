//! Executes one decoded instruction, whatever it is: the reference that the fast paths in `hot`
//! must agree with. One file per instruction family.
//!
//! On entry RIP is already past the instruction; `i.ip()` is its own. A family changes nothing
//! before the last point where it can fail. On a fault the caller restores RIP.

mod alu;
mod bits;
pub(crate) mod branch;
pub(crate) mod control;
pub(crate) mod cpuid;
mod far;
mod flow_system;
pub(crate) mod io;
mod mov;
pub(crate) mod msr;
mod muldiv;
mod shift;
mod sse;
mod stack;
pub(crate) mod string;
mod system;
pub(crate) mod task;
mod x87;
mod xsave;

use iced_x86::{Instruction, Mnemonic};

use crate::mem::Ctx;
use crate::trap::{Exec, UD};
use crate::{v86, vmx};

/// Whether `i` is a string instruction that repeats, so that it may take more than one tick.
pub(crate) fn is_repeated(i: &Instruction) -> bool {
    i.is_string_instruction() && (i.has_rep_prefix() || i.has_repne_prefix())
}

/// Whether `i` loads RF with the rest of RFLAGS, so that it stays set after it.
pub(crate) fn sets_resume_flag(i: &Instruction) -> bool {
    matches!(
        i.mnemonic(),
        Mnemonic::Iret
            | Mnemonic::Iretd
            | Mnemonic::Iretq
            | Mnemonic::Vmlaunch
            | Mnemonic::Vmresume
    )
}

/// Executes a repeated string instruction for at most `left` ticks and lowers `left` by those it
/// took. RIP stays at the instruction where it is not finished. A fault takes one tick.
pub(crate) fn repeat(x: &mut Ctx, i: &Instruction, left: &mut u64) -> Exec {
    let used = if string::is_string(i) {
        string::string(x, i, *left)
    } else {
        execute(x, i).map(|()| 1)
    };
    match used {
        Ok(ticks) => {
            *left -= ticks;
            Ok(())
        }
        Err(trap) => {
            *left -= 1;
            x.cpu.rip = i.ip();
            Err(trap)
        }
    }
}

/// Executes `i`.
#[inline(never)]
pub(crate) fn execute(x: &mut Ctx, i: &Instruction) -> Exec {
    use Mnemonic::*;
    if x.cpu.vmx.non_root {
        vmx::intercept::check(x, i)?;
    }
    match i.mnemonic() {
        // ---- integer ----
        Mov if !mov::is_system(i) => mov::mov(x, i),
        Movnti => mov::mov(x, i),
        Movzx => mov::mov(x, i),
        Movsx | Movsxd => mov::sign_extended(x, i),
        Movbe => mov::movbe(x, i),
        Bswap => mov::bswap(x, i),
        Lea => mov::lea(x, i),
        Xchg => mov::xchg(x, i),
        Xlatb => mov::xlat(x, i),
        Cmovo | Cmovno | Cmovb | Cmovae | Cmove | Cmovne | Cmovbe | Cmova | Cmovs | Cmovns
        | Cmovp | Cmovnp | Cmovl | Cmovge | Cmovle | Cmovg => mov::conditional(x, i),
        Seto | Setno | Setb | Setae | Sete | Setne | Setbe | Seta | Sets | Setns | Setp | Setnp
        | Setl | Setge | Setle | Setg => mov::set_condition(x, i),
        Cbw | Cwde | Cdqe => mov::extend_accumulator(x, i),
        Cwd | Cdq | Cqo => mov::sign_into_dx(x, i),
        Lahf => mov::lahf(x),
        Sahf => mov::sahf(x),
        Salc => mov::salc(x),
        Add | Adc | Sub | Sbb | And | Or | Xor => alu::binary(x, i),
        Cmp => alu::cmp(x, i),
        Test => alu::test(x, i),
        Inc | Dec | Neg | Not => alu::unary(x, i),
        Adcx | Adox => alu::add_one_flag(x, i),
        Xadd => alu::xadd(x, i),
        Cmpxchg => alu::cmpxchg(x, i),
        Cmpxchg8b | Cmpxchg16b => alu::cmpxchg_pair(x, i),
        Daa | Das => alu::decimal_adjust(x, i),
        Aaa | Aas => alu::ascii_adjust(x, i),
        Aam => alu::aam(x, i),
        Aad => alu::aad(x, i),
        Mul => muldiv::multiply_wide(x, i),
        Imul if i.op_count() == 1 => muldiv::multiply_wide(x, i),
        Imul => muldiv::multiply(x, i),
        Mulx => muldiv::mulx(x, i),
        Div => muldiv::div(x, i),
        Idiv => muldiv::idiv(x, i),
        Shl | Sal | Shr | Sar => shift::shift(x, i),
        Rol | Ror => shift::rotate(x, i),
        Rcl | Rcr => shift::rotate_through_carry(x, i),
        Shld | Shrd => shift::double_shift(x, i),
        Shlx | Shrx | Sarx => shift::shift_without_flags(x, i),
        Rorx => shift::rorx(x, i),
        Bt | Bts | Btr | Btc => bits::bit_test(x, i),
        Bsf | Bsr => bits::scan(x, i),
        Tzcnt | Lzcnt | Popcnt => bits::count(x, i),
        Andn => bits::andn(x, i),
        Blsi | Blsmsk | Blsr => bits::lowest_set(x, i),
        Bextr => bits::bextr(x, i),
        Bzhi => bits::bzhi(x, i),
        Pdep => bits::pdep(x, i),
        Pext => bits::pext(x, i),
        Clc | Stc | Cmc | Cld | Std => mov::one_flag(x, i),
        // Hints, and what is a hint as long as its feature is absent.
        Nop | Endbr32 | Endbr64 | Rdsspd | Rdsspq | Cldemote | Prefetch | Prefetchw
        | Prefetchwt1 | Prefetchnta | Prefetcht0 | Prefetcht1 | Prefetcht2 | Prefetchit0
        | Prefetchit1 | Reservednop => Ok(()),
        Pause => branch::pause(x),
        Push => stack::push(x, i),
        Pop if !mov::is_system(i) => stack::pop(x, i),
        Pusha | Pushad => stack::push_all(x, i),
        Popa | Popad => stack::pop_all(x, i),
        Pushf | Pushfd | Pushfq => stack::pushf(x, i),
        Popf | Popfd | Popfq => stack::popf(x, i),
        Enter => stack::enter(x, i),
        Leave => stack::leave(x, i),

        // ---- strings ----
        Movsb | Movsw | Movsd | Movsq | Cmpsb | Cmpsw | Cmpsd | Cmpsq | Scasb | Scasw | Scasd
        | Scasq | Lodsb | Lodsw | Lodsd | Lodsq | Stosb | Stosw | Stosd | Stosq
            if string::is_string(i) =>
        {
            string::string(x, i, 1).map(|_| ())
        }

        // ---- control flow ----
        Jmp if !branch::is_far(i) => branch::jmp(x, i),
        Call if !branch::is_far(i) => branch::call(x, i),
        Jo | Jno | Jb | Jae | Je | Jne | Jbe | Ja | Js | Jns | Jp | Jnp | Jl | Jge | Jle | Jg => {
            branch::conditional(x, i)
        }
        Ret => branch::ret(x, i),
        Loop | Loope | Loopne => branch::loop_(x, i),
        Jcxz | Jecxz | Jrcxz => branch::jump_if_count_zero(x, i),
        Bound => branch::bound(x, i),

        // ---- system ----
        In => io::input(x, i),
        Out => io::output(x, i),
        Insb | Insw | Insd | Outsb | Outsw | Outsd => io::string(x, i),
        Mov => system::mov(x, i),
        Pop => system::pop(x, i),
        Lds | Les | Lfs | Lgs | Lss => system::load_far(x, i),
        Lgdt | Lidt => system::load_table(x, i),
        Sgdt | Sidt => system::store_table(x, i),
        Lldt | Ltr => system::load_selector(x, i),
        Sldt | Str => system::store_selector(x, i),
        Smsw => system::smsw(x, i),
        Lmsw => system::lmsw(x, i),
        Lar => system::lar(x, i),
        Lsl => system::lsl(x, i),
        Verr | Verw => system::verify(x, i),
        Arpl => system::arpl(x, i),
        Jmp => far::jmp(x, i),
        Call => far::call(x, i),
        Retf => far::ret(x, i),
        Iret | Iretd | Iretq => far::iret(x, i),
        Syscall => flow_system::syscall(x),
        Sysret | Sysretq => flow_system::sysret(x, i),
        Sysenter => flow_system::sysenter(x),
        Sysexit | Sysexitq => flow_system::sysexit(x, i),
        Swapgs => flow_system::swapgs(x),
        Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase => flow_system::segment_base(x, i),
        Int | Int1 | Int3 | Into => flow_system::int(x, i),
        Hlt => flow_system::hlt(x),
        Monitor => flow_system::monitor(x, i),
        Mwait => flow_system::mwait(x),
        Cli => v86::cli(x),
        Sti => v86::sti(x),
        Stac => flow_system::set_ac(x, true),
        Clac => flow_system::set_ac(x, false),
        Rdtsc => flow_system::rdtsc(x),
        Rdtscp => flow_system::rdtscp(x),
        Rdpid => flow_system::rdpid(x, i),
        Rdpmc => flow_system::rdpmc(),
        Rdrand | Rdseed => flow_system::random(x, i),
        Clts => control::clts(x),
        Invlpg => control::invlpg(x, i),
        Invpcid => control::invpcid(x, i),
        Wbinvd | Invd => control::wbinvd(x),
        Clflush | Clflushopt => control::clflush(x, i),
        Xgetbv => control::xgetbv(x),
        Xsetbv => control::xsetbv(x),
        Cpuid => cpuid::cpuid(x),
        Rdmsr => msr::rdmsr(x),
        Wrmsr => msr::wrmsr(x),
        // Everything is in order already.
        Lfence | Mfence | Sfence => Ok(()),
        // Not in system-management mode.
        Rsm => Err(UD),

        // ---- virtualization ----
        Vmxon | Vmxoff | Vmclear | Vmptrld | Vmptrst | Vmread | Vmwrite | Vmcall | Vmfunc
        | Vmlaunch | Vmresume | Invept | Invvpid => vmx::instruction(x, i),

        // ----
        INVALID | Ud0 | Ud1 | Ud2 => Err(UD),

        // ---- MMX and SSE ----
        _ => sse::execute(x, i),
    }
}
