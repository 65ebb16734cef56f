//! The optimisations of the translator, each of which can be switched off.

nonroot_interpret::optimisations! {
    /// Named optimisations, all on by default.
    pub struct Switches {
        /// Jumps inside a page lead straight to the code of their target.
        chain = "chain";
        /// A block goes on after a branch, for as long as the branch is not taken.
        long_blocks = "long-blocks";
        /// Jumps to other pages, indirect jumps and returns look their target up inline.
        jump_lookup = "jump-lookup";
        /// Status flags that can be made again from registers are not saved.
        flag_recipes = "flag-recipes";
        /// Flags that rotations, INC, DEC and shifts by CL leave alone are not restored for them.
        flag_overlays = "flag-overlays";
        /// What a register was is kept where flags can be made again from it, and it is about to change.
        flag_stashes = "flag-stashes";
        /// Flags that a block overwrites before anybody sees them are not restored for rotations, INC and DEC before that.
        dead_flags = "dead-flags";
        /// Guest registers without a host register are loaded only where they must be.
        spilled_operands = "spilled-operands";
        /// One TLB lookup serves accesses of a block that are near each other.
        page_groups = "page-groups";
        /// Code that runs rarely is kept apart from code that runs often.
        cold_apart = "cold-apart";
        /// SSE and AVX instructions run as they are on the guest's vector registers.
        vectors = "vectors";
        /// x87 and MMX instructions run as they are on the guest's x87 state.
        x87 = "x87";
        /// CLI, STI, CLD, PUSHF, SWAPGS, STAC and CLAC run without leaving translated code.
        interrupt_flag = "interrupt-flag";
        /// MOVS and STOS are the host's own, page by page.
        strings = "strings";
        /// SYSCALL and SYSRETQ change the privilege level without leaving translated code.
        syscalls = "syscalls";
        /// RDTSC and RDTSCP ask for the time without leaving translated code.
        time_stamps = "time-stamps";
        /// Instructions that are not translated are interpreted without leaving translated code.
        callouts = "callouts";
        /// User code that runs for long reaches memory without lookups.
        windows = "windows";
        /// Instructions that lie in two pages are translated.
        page_crossing = "page-crossing";
    }
}
