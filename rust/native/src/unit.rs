//! The unit: compiles instructions, owns the thunks and the buffers they work on.

use crate::classify::{classify, Class};
use crate::features::HostFeatures;
use crate::plan::{portable, Compiled, Plan, ThunkRef, Unsupported};
use crate::state::{fx, VectorState, FCW_INIT, MXCSR_INIT};
use crate::thunk::Thunks;
use iced_x86::{Instruction, OpKind};

/// Bytes of generated code before everything is thrown away: some ten thousand thunks.
const DEFAULT_CAPACITY: usize = 1 << 20;

/// What a thunk works on besides the register file. Its layout is known to the generated code.
#[repr(C, align(64))]
#[derive(Clone, Debug)]
pub(crate) struct ThunkContext {
    /// The memory operand.
    pub scratch: [u8; 64],
    /// x87 state, in FXSAVE64's layout, to load before and saved after.
    pub fx: [u8; 512],
    /// General registers: the explicit operand, RAX, RDX, RCX.
    pub gpr: [u64; 4],
    /// RFLAGS before and after.
    pub rflags: u64,
    /// MXCSR to run with.
    pub mxcsr_in: u32,
    /// MXCSR afterwards; its low six bits are what the instruction raised.
    pub mxcsr_out: u32,
    /// The host's MXCSR, saved and restored by the thunk.
    pub mxcsr_host: u32,
    /// Exceptions (low six bits) that the guest does not mask.
    pub unmasked: u32,
}

impl ThunkContext {
    fn new() -> Self {
        let mut image = [0; 512];
        image[..2].copy_from_slice(&FCW_INIT.to_le_bytes());
        image[fx::MXCSR..fx::MXCSR + 4].copy_from_slice(&MXCSR_INIT.to_le_bytes());
        ThunkContext {
            scratch: [0; 64],
            fx: image,
            gpr: [0; 4],
            rflags: 0x202,
            mxcsr_in: MXCSR_INIT,
            mxcsr_out: MXCSR_INIT,
            mxcsr_host: MXCSR_INIT,
            unmasked: 0,
        }
    }

    /// Derives the MXCSR to run with from the guest's: no flags, everything
    /// masked. If the guest does not mask underflow, results that are tiny are
    /// flushed to zero, since that raises the underflow flag for exact tiny
    /// results as well, as unmasked underflow does; without tiny results it has no effect.
    pub(crate) fn set_mxcsr(&mut self, guest: u32) {
        const ROUNDING_FTZ_DAZ: u32 = 0xe040;
        const FTZ: u32 = 1 << 15;
        const UNDERFLOW: u32 = 1 << 4;
        self.unmasked = !(guest >> 7) & 0x3f;
        let flush = if self.unmasked & UNDERFLOW != 0 { FTZ } else { 0 };
        self.mxcsr_in = guest & ROUNDING_FTZ_DAZ | 0x1f80 | flush;
    }

    /// Takes the guest's x87 registers, control, status and tag words.
    #[inline]
    pub(crate) fn load_fx(&mut self, image: &[u8; 512]) {
        self.fx[..fx::FOP].copy_from_slice(&image[..fx::FOP]);
        self.fx[fx::FOP..fx::MXCSR].fill(0);
        self.fx[fx::ST..fx::XMM].copy_from_slice(&image[fx::ST..fx::XMM]);
    }

    /// Gives the x87 state that the thunk left, but for the pointers, which are the host's.
    #[inline]
    pub(crate) fn store_fx(&self, image: &mut [u8; 512]) {
        image[..fx::FTW + 1].copy_from_slice(&self.fx[..fx::FTW + 1]);
        for n in 0..8 {
            let at = fx::ST + 16 * n;
            image[at..at + 10].copy_from_slice(&self.fx[at..at + 10]);
        }
    }

    /// The status word that the thunk left.
    pub(crate) fn fsw(&self) -> u16 {
        u16::from_le_bytes([self.fx[fx::FSW], self.fx[fx::FSW + 1]])
    }
}

/// Compiles and holds the native code for one vCPU.
///
/// Thunk memory is bounded: when it is full it is emptied and a new
/// [`NativeUnit::generation`] begins. Older [`Compiled`] instructions then stop
/// with [`crate::Stop::Stale`] and are to be compiled again; so are those of
/// another unit.
pub struct NativeUnit {
    features: HostFeatures,
    thunks: Thunks,
    context: Box<ThunkContext>,
}

impl Default for NativeUnit {
    fn default() -> Self {
        NativeUnit::new()
    }
}

impl NativeUnit {
    /// A unit with all that the host can do. Memory for code is taken with the first thunk.
    pub fn new() -> Self {
        NativeUnit::with_features(HostFeatures::ALL)
    }

    /// A unit for a guest CPU that has `features`; what the host lacks is left out.
    pub fn with_features(features: HostFeatures) -> Self {
        // Without native code nothing depends on the host, and what has a portable plan works.
        let host = if Thunks::AVAILABLE { HostFeatures::of_host() } else { HostFeatures::ALL };
        let features = features.intersection(host);
        let thunks = Thunks::new(DEFAULT_CAPACITY);
        NativeUnit { features, thunks, context: Box::new(ThunkContext::new()) }
    }

    /// The same unit with another bound on its generated code, in bytes
    /// (rounded up to whole pages); what was compiled before becomes stale.
    pub fn with_code_capacity(self, bytes: usize) -> Self {
        NativeUnit { thunks: Thunks::new(bytes), ..self }
    }

    /// What this unit executes.
    pub fn features(&self) -> HostFeatures {
        self.features
    }

    /// What the host can do, whatever a guest's policy is.
    pub fn supported_features() -> HostFeatures {
        HostFeatures::of_host()
    }

    /// Changes whenever thunks that were handed out become stale.
    pub fn generation(&self) -> u32 {
        self.thunks.generation()
    }

    /// Number of thunks and bytes of code that exist.
    pub fn usage(&self) -> (usize, usize) {
        self.thunks.usage()
    }

    /// Compiles a decoded instruction.
    pub fn compile(&mut self, instruction: &Instruction) -> Result<Compiled, Unsupported> {
        let class = classify(instruction).ok_or(Unsupported::NotThisUnit)?;
        let known = |feature: &_| match HostFeatures::of(*feature) {
            Some(needed) => self.features.contains(needed),
            None => false,
        };
        // WAIT is older than features.
        if class != Class::Wait && !instruction.cpuid_features().iter().all(known) {
            return Err(Unsupported::Feature);
        }
        if let Some((plan, memory)) = portable(instruction)? {
            return Ok(Compiled { class, memory, plan });
        }
        let memory_operands = (0..instruction.op_count()).filter(|&n| is_memory(instruction.op_kind(n)));
        if memory_operands.count() > 1 {
            return Err(Unsupported::Encoding("two memory operands".to_string()));
        }
        let (thunk, memory) = self.thunks.compile(instruction, class)?;
        Ok(Compiled { class, memory, plan: Plan::Thunk(thunk) })
    }

    /// Whether a thunk is from this unit's present generation.
    #[inline]
    pub(crate) fn is_current(&self, thunk: &ThunkRef) -> bool {
        thunk.generation == self.thunks.generation()
    }

    #[inline]
    pub(crate) fn context(&mut self) -> &mut ThunkContext {
        &mut self.context
    }

    /// Runs a thunk. Gives the unmasked SIMD exceptions that it raised (if
    /// there are any, no vector register has changed); `None` if it is stale.
    #[inline]
    pub(crate) fn call(&mut self, thunk: &ThunkRef, state: &mut VectorState) -> Option<u32> {
        // SAFETY: the thunk is current, so its code is in our memory; state and context are
        // exclusively borrowed.
        self.is_current(thunk).then(|| unsafe { self.thunks.call(thunk, state, &mut *self.context) })
    }
}

fn is_memory(kind: OpKind) -> bool {
    !matches!(
        kind,
        OpKind::Register
            | OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}
