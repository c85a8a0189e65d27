#include "shadow.h"

namespace mtbert::machine::host {
namespace {

constexpr int kLanes = 32;

}  // namespace

void Shadow::reset(std::size_t bytes, bool initialised) {
    grains_.assign((bytes + kGrain - 1) / kGrain, Grain{});
    initialised_ = initialised;
}

bool Shadow::ordered(const Beginnings& now, const Who& who, const Touch& touch) const {
    if (touch.block_epoch < beginning(now)) {
        return true;
    }
    if (touch.block_epoch < now.block) {
        return false;  // another block
    }
    if (touch.block_epoch < who.block_epoch) {
        return true;
    }
    if (touch.thread / kLanes != who.thread / kLanes) {
        return false;
    }
    return touch.warp_epoch < who.warp_epoch ||
           (touch.thread == who.thread && !touch.whole_warp && !who.whole_warp);
}

std::string Shadow::at(std::size_t grain) const { return "byte " + std::to_string(grain * kGrain) + " of " + name_; }

std::string Shadow::pending(const Beginnings& now, std::size_t grain, const char* deed) const {
    const Grain& g = grains_[grain];
    if (g.pending_block != now.block) {
        return "";
    }
    return at(grain) + " is " + deed + " while a copy_async16 of thread " + std::to_string(g.pending_thread) +
           " to it is under way";
}

std::string Shadow::race(const Beginnings& now, std::size_t grain, const Touch& touch, const char* deed,
                         const char* earlier) const {
    std::string who = "a thread of another block";
    if (touch.block_epoch >= now.block) {
        who = touch.whole_warp ? "warp " + std::to_string(touch.thread / kLanes)
                               : "thread " + std::to_string(touch.thread);
    }
    return "race: " + at(grain) + " is " + deed + ", and " + who + " " + earlier + " it with no barrier in between";
}

std::string Shadow::read(const Beginnings& now, const Who& who, std::size_t offset, std::size_t bytes) {
    const Touch touch{who.block_epoch, who.warp_epoch, static_cast<std::uint16_t>(who.thread), who.whole_warp};
    for (std::size_t grain = offset / kGrain; grain < (offset + bytes + kGrain - 1) / kGrain; ++grain) {
        Grain& g = grains_[grain];
        if (g.pending_block == now.block) {
            return pending(now, grain, "read");
        }
        const std::uint32_t since = block_local_ ? now.block : 1;
        if (!initialised_ && g.writer.block_epoch < since) {
            return at(grain) + " is read and was never written";
        }
        if (!ordered(now, who, g.writer)) {
            return race(now, grain, g.writer, "read", "wrote");
        }
        Touch& reader = g.reader;
        if (reader.block_epoch >= beginning(now) && reader.block_epoch < now.block) {
            g.many_blocks = now.launch;
        }
        if (reader.block_epoch != who.block_epoch) {
            reader = touch;
            g.many_warps = false;
        } else if (reader.thread / kLanes != who.thread / kLanes) {
            g.many_warps = true;
        } else if (reader.warp_epoch != who.warp_epoch) {
            reader = touch;
        } else if (reader.thread != who.thread || who.whole_warp) {
            reader.whole_warp = true;
        }
    }
    return "";
}

std::string Shadow::check_write(const Beginnings& now, const Who& who, std::size_t grain) const {
    const Grain& g = grains_[grain];
    if (g.pending_block == now.block) {
        return pending(now, grain, "written");
    }
    if (!ordered(now, who, g.writer)) {
        return race(now, grain, g.writer, "written", "wrote");
    }
    if (!ordered(now, who, g.reader)) {
        return race(now, grain, g.reader, "written", "read");
    }
    if (g.many_warps && g.reader.block_epoch == who.block_epoch) {
        return "race: " + at(grain) + " is written, and threads of several warps read it with no barrier in between";
    }
    if (g.many_blocks == now.launch) {
        return "race: " + at(grain) + " is written, and a thread of another block read it";
    }
    return "";
}

std::string Shadow::write(const Beginnings& now, const Who& who, std::size_t offset, std::size_t bytes) {
    for (std::size_t grain = offset / kGrain; grain < (offset + bytes + kGrain - 1) / kGrain; ++grain) {
        std::string problem = check_write(now, who, grain);
        if (!problem.empty()) {
            return problem;
        }
    }
    land(who, offset, bytes);
    return "";
}

std::string Shadow::begin(const Beginnings& now, const Who& who, std::size_t offset, std::size_t bytes) {
    for (std::size_t grain = offset / kGrain; grain < (offset + bytes + kGrain - 1) / kGrain; ++grain) {
        std::string problem = check_write(now, who, grain);
        if (!problem.empty()) {
            return problem;
        }
        grains_[grain].pending_block = now.block;
        grains_[grain].pending_thread = static_cast<std::uint16_t>(who.thread);
    }
    return "";
}

void Shadow::land(const Who& who, std::size_t offset, std::size_t bytes) {
    for (std::size_t grain = offset / kGrain; grain < (offset + bytes + kGrain - 1) / kGrain; ++grain) {
        Grain& g = grains_[grain];
        g.pending_block = 0;
        g.writer = Touch{who.block_epoch, who.warp_epoch, static_cast<std::uint16_t>(who.thread), false};
        g.reader = Touch{};
        g.many_warps = false;
    }
}

}  // namespace mtbert::machine::host
