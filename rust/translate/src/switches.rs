//! The optimisations of the translator, each of which can be switched off.

macro_rules! switches {
    ($($(#[doc = $doc:literal])+ $field:ident = $name:literal;)*) => {
        /// Named optimisations, all on by default.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct Switches { $($(#[doc = $doc])+ pub $field: bool,)* }
        impl Default for Switches {
            fn default() -> Self { Switches { $($field: true,)* } }
        }
        impl Switches {
            /// (name, description) of each.
            pub const ALL: &'static [(&'static str, &'static str)] = &[$(($name, concat!($($doc),+)),)*];
            /// Switches one off; false if there is none of that name.
            pub fn switch_off(&mut self, name: &str) -> bool {
                match name { $($name => { self.$field = false; true })* _ => false }
            }
        }
    };
}

switches! {
    /// Jumps inside a page lead straight to the code of their target.
    chain = "chain";
    /// Jumps to other pages, indirect jumps and returns look their target up inline.
    jump_lookup = "jump-lookup";
    /// Status flags that can be made again from registers are not saved.
    flag_recipes = "flag-recipes";
    /// One TLB lookup serves accesses of a block that are near each other.
    page_groups = "page-groups";
    /// SSE and AVX instructions run as they are on the guest's vector registers.
    vectors = "vectors";
    /// CLI, STI, CLD, PUSHF, SWAPGS, STAC and CLAC run without leaving translated code.
    interrupt_flag = "interrupt-flag";
    /// Instructions that lie in two pages are translated.
    page_crossing = "page-crossing";
}
