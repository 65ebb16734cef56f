//! Grants that are changed meanwhile, and frames that are no memory of the guest's.

use crate::guest::{Guest, DEVICE, FRAMES, NEVER_GRANTED, PERMIT, READONLY, READ_ONLY};
use std::sync::atomic::{AtomicBool, Ordering};

#[test]
fn only_memory_of_the_domain_is_granted() {
    let guest = Guest::new();
    let grants = guest.grants();
    let able = |flags: u32, gfn: u64| {
        guest.grant(9, flags, gfn);
        [false, true].map(|write| grants.page(&guest.memory, 9, write).is_some())
    };
    assert_eq!(able(PERMIT, 7), [true, true]);
    assert_eq!(able(PERMIT | READONLY, 7), [true, false]);
    assert_eq!(able(PERMIT, READ_ONLY), [true, false]);
    assert_eq!(able(PERMIT | 3 << 16, 7), [false, false]);
    assert_eq!(able(0, 7), [false, false]);
    assert_eq!(able(2, 7), [false, false]);
    assert_eq!(able(3, 7), [false, false]);
    for gfn in [FRAMES, 1 << 28, u64::from(u32::MAX)] {
        assert_eq!(able(PERMIT, gfn), [false, false]);
    }
    // As in `Physmap.page`: a device's memory is not the domain's to grant.
    assert_eq!(able(PERMIT, DEVICE), [false, false]);
}

#[test]
fn a_mark_of_another_user_stays() {
    let guest = Guest::new();
    let grants = guest.grants();
    guest.grant(3, PERMIT | 8, 7);
    assert!(grants.write(&guest.memory, 3, |page| assert_eq!(page.gfn, 7)));
    assert_eq!(guest.entry(3).0.load(Ordering::SeqCst), PERMIT | 8);
    guest.grant(3, PERMIT | READONLY, 7);
    assert!(!grants.write(&guest.memory, 3, |_| panic!("written")));
    assert_eq!(guest.entry(3).0.load(Ordering::SeqCst), PERMIT | READONLY);
}

#[test]
fn an_entry_that_never_rests_is_refused_soon() {
    let guest = Guest::new();
    let grants = guest.grants();
    let stop = AtomicBool::new(false);
    guest.grant(3, PERMIT, 7);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Bits that mean nothing, the frame, and what the frame may be used for.
            let mut number = 0u32;
            while !stop.load(Ordering::Relaxed) {
                number = number.wrapping_add(1);
                let (word, frame) = guest.entry(3);
                frame.store([7, 8, u32::MAX][number as usize % 3], Ordering::SeqCst);
                word.store(PERMIT | number << 5 & 0xffe0 | number & READONLY, Ordering::SeqCst);
            }
        });
        for _ in 0..2000 {
            grants.write(&guest.memory, 3, |page| {
                assert!([7, 8].contains(&page.gfn) && !NEVER_GRANTED.contains(&page.gfn));
            });
        }
        stop.store(true, Ordering::Relaxed);
    });
}
